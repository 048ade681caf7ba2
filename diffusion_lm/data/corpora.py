"""Corpora: text files, folders, JSON records and this Python's standard library; and the split into train and valid.

A corpus can be read any number of times. Bytes are decoded as UTF-8, without a byte order mark; nothing else changes.
"""

import functools
import glob
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging

from diffusion_lm.data import standard_library
from diffusion_lm.data.text_parts import CUTS, cut, decode, lines, parts_of, sliced, suffix_of
from diffusion_lm.progress import Progress

RECORDS = (".jsonl", ".ndjson")  # one JSON object a line
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", *RECORDS)  # the files of a folder that are read
_BLOCK = 1 << 20  # bytes hashed at a time
OTHERS = {".zip", ".tar", ".tgz", ".zst", ".7z", ".parquet", ".arrow", ".feather"}


class Corpus(Protocol):
    """Documents in a fixed order. Implement it as a frozen dataclass to use it as `data.path` of a config.

    A corpus of long documents may also have document_parts(), see below.
    """

    def documents(self) -> Iterator[str]:
        """The documents, from the first, at every call."""

    def fingerprint(self) -> str:
        """A short string that changes when any document does."""


def document_parts(corpus: Corpus) -> Iterator[Iterable[str]]:
    """The documents, each in parts that make it up when they are joined; none must be in memory as a whole.

    Take a document's parts before the next document.
    """
    own = getattr(corpus, "document_parts", None)
    return own() if own else map(sliced, corpus.documents())


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents held in memory."""

    texts: tuple[str, ...]

    def documents(self) -> Iterator[str]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        return _joined(_sha256(sliced(text)) for text in self.texts)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Documents in files.

    read      (file, root) -> the texts of a file, each in parts
    reading   a name for what `read` does; the fingerprint covers it, the files' contents and their names below `root`
    unit      a key of CUTS: how a text is cut into documents
    """

    files: tuple[Path, ...]
    root: Path
    read: Callable[[Path, Path], Iterator[Iterable[str]]] = field(repr=False)
    reading: str
    unit: str

    def documents(self) -> Iterator[str]:
        """As `document_parts`, whole."""
        return map("".join, self.document_parts())

    def document_parts(self) -> Iterator[Iterable[str]]:
        """Skips empty documents and logs how many. Raises ValueError if none is left, or if a file isn't text."""
        found = empty = 0
        for file in self.files:
            for text in self.read(file, self.root):
                for document in cut(text, self.unit):
                    if (kept := _unless_blank(document)) is None:
                        empty += 1
                    else:
                        found += 1
                        yield kept
        if empty:
            _log_once(f"{self.root}: skipped {empty} empty documents, read {found}")
        if not found:
            raise ValueError(f"the corpus is empty: none of {len(self.files)} files in {self.root} holds any text")

    def fingerprint(self) -> str:
        names = (file.relative_to(self.root).as_posix().encode() for file in self.files)
        return _digest(self.reading.encode(), self.unit.encode(), *names, *_digests(self.files))


@functools.cache  # a run reads its corpus several times
def _log_once(message: str) -> None:
    logging.info("%s", message)


def corpus(path: str, *, documents: str = "file", field: str = "text") -> Corpus:
    """Opens a corpus; documents are read when they are asked for.

    Args:
      path: 'python-docs' (the docstrings of each standard-library module, under their dotted names), 'python-source'
        (the source of these modules), a file, a folder (files that end in TEXT_SUFFIXES, sorted) or a glob.
        .jsonl and .ndjson files hold a JSON object a line, .json files a list of objects. Any file may be
        compressed (.gz, .bz2, .xz).
      documents: 'file': a text (a file, a module or a record) is one document. 'line', 'paragraph': each of its lines
        or paragraphs is one, without the line ends around it.
      field: the key of a record that holds the text.

    Raises FileNotFoundError or ValueError if there is nothing to read.
    """
    if documents not in CUTS:
        raise ValueError(f"documents {documents!r}: choose one of {', '.join(map(repr, CUTS))}")
    library = {"python-docs": standard_library.docstrings, "python-source": _whole}
    if path in library:
        root, files = standard_library.files()
        return Files(files=files, root=root, read=library[path], reading=path, unit=documents)
    root, files = _find(path)
    suffixes = [suffix_of(file) for file in files]
    if field != "text" and not {*RECORDS, ".json"}.intersection(suffixes):
        raise ValueError(f"field {field!r} is for .jsonl files, and {path} has none: leave field as it was")
    for file, suffix in zip(files, suffixes, strict=True):
        if suffix in OTHERS:
            raise ValueError(f"{file}: {suffix} files can't be read: unpack or convert it to text or .jsonl")
    read = functools.partial(_text_or_records, take=functools.partial(_field, field=field))
    return Files(files=files, root=root, read=read, reading=f"field {field}", unit=documents)


def records(path: str, take: Callable[[object, str], str], *, reading: str) -> Corpus:
    """A corpus of JSON records, one a line, or a .json file's list: take(record, where it is) -> its text.

    Raises FileNotFoundError or ValueError if there is nothing to read, or files that hold no records.
    """
    root, files = _find(path)
    for file in files:
        if suffix_of(file) not in (*RECORDS, ".json"):
            raise ValueError(f"{file} holds no records: name files of JSON lines (.jsonl), by a glob if need be")
    read = functools.partial(_text_or_records, take=take)
    return Files(files=files, root=root, read=read, reading=reading, unit="file")


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """The documents whose hash lies in [low, high).

    hashes  int64, of all documents: to hash one, and only then deliver it, would need all of it in memory
    """

    whole: Corpus
    low: int
    high: int
    hashes: np.ndarray = field(repr=False, compare=False)

    def documents(self) -> Iterator[str]:
        return self._chosen(self.whole.documents())

    def document_parts(self) -> Iterator[Iterable[str]]:
        return self._chosen(document_parts(self.whole))

    def _chosen(self, documents: Iterator[Any]) -> Iterator[Any]:
        for value, document in itertools.zip_longest(self.hashes, documents):
            if value is None or document is None:
                raise ValueError("the corpus has more or fewer documents than when it was divided: begin anew")
            if self.low <= value < self.high:
                yield document

    def fingerprint(self) -> str:
        return _digest(self.whole.fingerprint().encode(), b"hash", f"{self.low} {self.high}".encode())


@dataclass(frozen=True, kw_only=True)
class Span:
    """Characters [start, stop) of a corpus's only document."""

    whole: Corpus
    start: int
    stop: int

    def documents(self) -> Iterator[str]:
        return map("".join, self.document_parts())

    def document_parts(self) -> Iterator[Iterable[str]]:
        yield self._parts()

    def _parts(self) -> Iterator[str]:
        begin = 0
        for part in next(document_parts(self.whole)):
            if begin >= self.stop:
                return
            if inside := part[max(self.start - begin, 0) : self.stop - begin]:
                yield inside
            begin += len(part)

    def fingerprint(self) -> str:
        return _digest(self.whole.fingerprint().encode(), b"span", f"{self.start} {self.stop}".encode())


def split(whole: Corpus, val_fraction: float) -> tuple[Corpus, Corpus]:
    """Splits a corpus into (train, valid); reads it once.

    About `val_fraction` of the documents are held out, chosen by the hash of their text: order, additions and
    repetitions move no document to the other side. If a side would be empty, it gets the document with the least
    (valid) or greatest (train) hash. A corpus of one document of n characters is cut at int(n * (1 - val_fraction)).
    0 holds out nothing. Raises ValueError outside [0, 1), or if all documents are the same text.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction} is not a fraction in [0, 1)")
    if val_fraction == 0:
        return whole, Texts(texts=())
    hashes = np.fromiter(map(_hash, _announced(document_parts(whole))), np.int64)
    if len(hashes) == 1:
        return _split_one(whole, val_fraction)
    if len(hashes) == 0 or hashes.min() == hashes.max():
        raise ValueError(f"all {len(hashes)} documents are the same text: none can be held out, set val_fraction to 0")
    edge = int(np.clip(int(val_fraction * 2**63), hashes.min() + 1, hashes.max()))
    return tuple(Hashed(whole=whole, low=low, high=high, hashes=hashes) for low, high in ((edge, 2**63), (0, edge)))


def _announced(documents: Iterator[Iterable[str]]) -> Iterator[Iterator[str]]:
    """The documents; says from time to time how much of them was read."""
    progress, characters = Progress(), 0

    def read(number: int, parts: Iterable[str]) -> Iterator[str]:
        nonlocal characters
        for part in parts:
            yield part
            characters += len(part)
            if progress.due():
                logging.info(
                    "dividing the corpus: %d documents, %.1f million characters so far", number, characters / 1e6
                )

    return itertools.starmap(read, enumerate(documents, 1))


def _split_one(whole: Corpus, val_fraction: float) -> tuple[Corpus, Corpus]:
    size = sum(map(len, next(document_parts(whole))))
    edge = int(size * (1 - val_fraction))
    if not 0 < edge < size:
        raise ValueError(
            f"the only document has {size} characters, too few to hold out {val_fraction}: set val_fraction to 0"
        )
    return Span(whole=whole, start=0, stop=edge), Span(whole=whole, start=edge, stop=size)


def _hash(parts: Iterable[str]) -> int:
    """63 bits."""
    return int.from_bytes(_sha256(parts)[:8]) >> 1


def _sha256(parts: Iterable[str]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.digest()


def _digest(*parts: bytes) -> str:
    return _joined(hashlib.sha256(part).digest() for part in parts)


def _joined(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _unless_blank(document: Iterable[str]) -> Iterable[str] | None:
    """A document's parts; None if they hold no text."""
    parts, blank = iter(document), []
    for part in parts:
        if part and not part.isspace():
            return itertools.chain(blank, [part], parts)
        blank.append(part)
    return None


def _digests(files: tuple[Path, ...]) -> Iterator[bytes]:
    """SHA-256 of each file."""
    progress, read, size = Progress(), 0, sum(file.stat().st_size for file in files)
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                read += len(block)
                if progress.due():
                    logging.info("hashing files: %.1f of %.1f MB so far", read / 1e6, size / 1e6)
        yield digest.digest()


def _find(path: str) -> tuple[Path, tuple[Path, ...]]:
    """The folder of the files that `path` names, and the files in order."""
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
    """Files with a known suffix. A warning counts the others, hidden ones included."""
    files, others = [], Counter()
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if suffix_of(file) in TEXT_SUFFIXES and not hidden:
            files.append(file)
        else:
            others["hidden" if hidden else file.suffix.lower() or "no suffix"] += 1
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        logging.warning("%s: left out %d files that aren't known as text: %s", folder, others.total(), counts)
    if not files:
        raise ValueError(f"no text in {folder}: no file ends in {' '.join(TEXT_SUFFIXES)}; name others by a glob")
    return tuple(files)


def _whole(file: Path, root: Path) -> Iterator[Iterable[str]]:
    del root
    yield parts_of(file)


def _text_or_records(file: Path, root: Path, *, take: Callable[[object, str], str]) -> Iterator[Iterable[str]]:
    suffix = suffix_of(file)
    if suffix not in (*RECORDS, ".json"):
        return _whole(file, root)
    return map(sliced, _listed(file, take) if suffix == ".json" else _records(file, take))


def _listed(file: Path, take: Callable[[object, str], str]) -> Iterator[str]:
    """The text of each object of a JSON list."""
    hint = "give a list of objects, name it .jsonl if each line is one, or .txt to train on it as it stands"
    try:
        records = json.loads("".join(parts_of(file)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: broken JSON: {error}: {hint}") from error
    if not isinstance(records, list):
        raise ValueError(f"{file}: it holds no list of objects: {hint}")
    for number, record in enumerate(records, 1):
        yield take(record, f"{file}, record {number}")


def _records(file: Path, take: Callable[[object, str], str]) -> Iterator[str]:
    """The text of each line of JSON; an empty one for a blank line."""
    for number, line in enumerate(lines(file), 1):
        where = f", line {number}"
        try:
            yield take(json.loads(decode(file, line, where)), f"{file}{where}") if line.strip() else ""
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}{where}: broken JSON: {error}") from error


def _field(record: object, where: str, *, field: str) -> str:
    if not isinstance(record, dict) or field not in record:
        has = ", ".join(map(repr, record)) if isinstance(record, dict) else "no fields"
        raise ValueError(f"{where}: no field {field!r}, it has {has}: set field to the one with the text")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is {type(text).__name__}, not text")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where}: field {field!r} holds half a surrogate pair, no character: remove it")
    return text
