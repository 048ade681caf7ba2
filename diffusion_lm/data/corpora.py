"""Where text comes from: the standard library of this Python, files, folders, JSON lines; and what is held out.

A corpus can be read again and again. Documents are never changed: bytes are decoded as UTF-8 and nothing more.
"""

import ast
import functools
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from absl import logging

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")  # what is read from a folder
# tests, other people's packages, vendored tools, and tables that are no prose and hardly code
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
CUTS = {"file": None, "line": re.compile(r"\r?\n"), "paragraph": re.compile(r"\r?\n(?:[ \t]*\r?\n)+")}


class Corpus(Protocol):
    """Documents in a fixed order, and 16 hexadecimal digits that change when any of them does."""

    def documents(self) -> Iterator[str]: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents held in memory."""

    texts: tuple[str, ...]

    def documents(self) -> Iterator[str]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        return _digest(*(text.encode() for text in self.texts))


@dataclass(frozen=True, kw_only=True)
class Files:
    """Documents read from files.

    read: (file, root) -> the texts in a file, each of which is cut into documents as `unit`, a key of CUTS, says
    reading: what `read` does, in a word; a part of the fingerprint, as are contents and names below `root`
    """

    files: tuple[Path, ...]
    root: Path
    read: Callable[[Path, Path], Iterator[str]] = field(repr=False)
    reading: str
    unit: str

    def documents(self) -> Iterator[str]:
        """Skips empty documents and says how many. ValueError if nothing is left, or for a file that isn't text."""
        found = empty = 0
        for file in self.files:
            for text in self.read(file, self.root):
                for document in _cut(text, self.unit):
                    if document.strip():
                        found += 1
                        yield document
                    else:
                        empty += 1
        if empty:
            logging.info("%s: skipped %d empty documents, read %d", self.root, empty, found)
        if not found:
            raise ValueError(f"the corpus is empty: none of {len(self.files)} files in {self.root} holds any text")

    def fingerprint(self) -> str:
        names = (file.relative_to(self.root).as_posix().encode() for file in self.files)
        return _digest(self.reading.encode(), self.unit.encode(), *names, *map(_digest_file, self.files))


def corpus(path: str, *, documents: str = "file", field: str = "text") -> Corpus:
    """Opens a corpus. Nothing but names is read until its documents are asked for.

    path: 'python-docs', a document for each standard-library module: its docstrings, under their dotted names;
        'python-source', the source of the same modules; or a file, a folder (all TEXT_SUFFIXES below it, sorted; others
        are counted in a warning) or a glob (whatever matches). A .jsonl file holds a text in the `field` of each line.
    documents: whether a text (a file, a module, a JSON line) is one document ('file'), or each of its lines ('line')
        or paragraphs ('paragraph') is; the ends of lines and the blank lines between paragraphs are then left out.

    FileNotFoundError or ValueError where there is nothing to read.
    """
    if documents not in CUTS:
        raise ValueError(f"documents {documents!r}: choose one of {', '.join(map(repr, CUTS))}")
    library = {"python-docs": _docstrings, "python-source": _whole}
    if path in library:
        root, files = _standard_library()
        return Files(files=files, root=root, read=library[path], reading=path, unit=documents)
    root, files = _find(path)
    if field != "text" and not any(file.suffix == ".jsonl" for file in files):
        raise ValueError(f"field {field!r} is for .jsonl files, and {path} has none: leave field as it was")
    read = functools.partial(_text_or_records, field=field)
    return Files(files=files, root=root, read=read, reading=f"field {field}", unit=documents)


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """The documents whose hash is in low..high-1."""

    whole: Corpus
    low: int
    high: int

    def documents(self) -> Iterator[str]:
        return (text for text in self.whole.documents() if self.low <= _hash(text) < self.high)

    def fingerprint(self) -> str:
        return _digest(self.whole.fingerprint().encode(), b"hash", f"{self.low} {self.high}".encode())


@dataclass(frozen=True, kw_only=True)
class Span:
    """Characters start..stop-1 of a corpus's only document."""

    whole: Corpus
    start: int
    stop: int

    def documents(self) -> Iterator[str]:
        return (text[self.start : self.stop] for text in self.whole.documents())

    def fingerprint(self) -> str:
        return _digest(self.whole.fingerprint().encode(), b"span", f"{self.start} {self.stop}".encode())


def split(whole: Corpus, holdout: float) -> tuple[Corpus, Corpus]:
    """(training, held out): about `holdout` of the documents, chosen by the hash of their text.

    A document's side depends on its text alone, so order, additions and repetitions move none. If that leaves a side
    empty, the one document with the least hash is held out, or the one with the greatest is trained on. Of a corpus
    with a single document of n characters, those from int(n * (1 - holdout)) on are held out. A holdout of 0 holds out
    nothing. ValueError if holdout isn't in [0, 1), or if nothing can be told apart. Reads the corpus once.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout {holdout} is not a fraction in [0, 1)")
    if holdout == 0:
        return whole, Texts(texts=())
    hashes = np.fromiter(map(_hash, whole.documents()), np.int64)
    if len(hashes) == 1:
        return _split_one(whole, holdout)
    if len(hashes) == 0 or hashes.min() == hashes.max():
        raise ValueError(f"all {len(hashes)} documents are the same text: none can be held out, set holdout to 0")
    edge = int(np.clip(int(holdout * 2**63), hashes.min() + 1, hashes.max()))
    return Hashed(whole=whole, low=edge, high=2**63), Hashed(whole=whole, low=0, high=edge)


def _split_one(whole: Corpus, holdout: float) -> tuple[Corpus, Corpus]:
    size = len(next(iter(whole.documents())))
    edge = int(size * (1 - holdout))
    if not 0 < edge < size:
        raise ValueError(f"the only document has {size} characters, too few to hold out {holdout}: set holdout to 0")
    return Span(whole=whole, start=0, stop=edge), Span(whole=whole, start=edge, stop=size)


def _hash(text: str) -> int:
    """63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _cut(text: str, unit: str) -> list[str]:
    ends = CUTS[unit]
    return [part.strip("\r\n") for part in ends.split(text)] if ends else [text]


def _find(path: str) -> tuple[Path, tuple[Path, ...]]:
    """The files that `path` names, in order, and the folder they lie in."""
    place = Path(path).expanduser()
    if place.is_file():
        return place.parent, (place,)
    if place.is_dir():
        return place, _text_files(place)
    files = tuple(file for file in map(Path, sorted(glob.glob(str(place), recursive=True))) if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"no corpus at {path}: give a file, a folder, a glob that matches files, 'python-docs' or 'python-source'"
        )
    return Path(os.path.commonpath([file.parent for file in files])), files


def _text_files(folder: Path) -> tuple[Path, ...]:
    """Files with a known suffix; the others, and those that are hidden or in hidden folders, are counted."""
    files, others = [], Counter()
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix in TEXT_SUFFIXES and not hidden:
            files.append(file)
        else:
            others["hidden" if hidden else file.suffix or "no suffix"] += 1
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        logging.warning("%s: left out %d files that aren't known as text: %s", folder, others.total(), counts)
    if not files:
        raise ValueError(f"no text in {folder}: no file ends in {' '.join(TEXT_SUFFIXES)}; name others by a glob")
    return tuple(files)


def _standard_library() -> tuple[Path, tuple[Path, ...]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - SKIPPED  # other people's packages may be many
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise FileNotFoundError(f"this Python has no standard-library source in {root}: give a file or folder of text")
    return root, tuple(sorted(files))


def _text(file: Path, data: bytes, where: str = "") -> str:
    """UTF-8 to text. ValueError naming the file for what is no text."""
    if b"\0" in data:
        raise ValueError(f"{file}{where}: a binary file (it holds NUL bytes): leave it out of the corpus")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}{where}: not UTF-8 (byte {error.start}): convert it or leave it out") from error


def _whole(file: Path, root: Path) -> Iterator[str]:
    del root
    yield _text(file, file.read_bytes())


def _text_or_records(file: Path, root: Path, *, field: str) -> Iterator[str]:
    return _records(file, field) if file.suffix == ".jsonl" else _whole(file, root)


def _records(file: Path, field: str) -> Iterator[str]:
    """`field` of each line of JSON; an empty text for a blank line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield _record(file, number, line, field) if line.strip() else ""


def _record(file: Path, number: int, line: bytes, field: str) -> str:
    where = f", line {number}"
    try:
        record = json.loads(_text(file, line, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}{where}: broken JSON: {error}") from error
    if not isinstance(record, dict) or field not in record:
        has = ", ".join(map(repr, record)) if isinstance(record, dict) else "no fields"
        raise ValueError(f"{file}{where}: no field {field!r}, it has {has}: set field to the one with the text")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{file}{where}: field {field!r} is {type(text).__name__}, not text")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{file}{where}: field {field!r} holds half a surrogate pair, no character: remove it")
    return text


def _docstrings(file: Path, root: Path) -> Iterator[str]:
    parts = file.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    yield "\n\n".join(_module_docstrings(file, name))


@functools.cache  # parsing takes seconds, and a run reads its corpus several times
def _module_docstrings(file: Path, name: str) -> tuple[str, ...]:
    return tuple(_described(ast.parse(_text(file, file.read_bytes())), name))


def _described(node: ast.AST, name: str) -> Iterator[str]:
    """Name and cleaned docstring of a module, class or function, then of those defined directly in it."""
    if docstring := ast.get_docstring(node):
        yield f"{name}\n{docstring}\n"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}")
