"""Text in parts, so that one of any size needs the memory of a part: files read, cut into documents and into lines.

A text in parts is an iterator of strings that make up the text when they are joined; where they are cut has no meaning.
"""

import bz2
import codecs
import contextlib
import gzip
import itertools
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PART = 1 << 18  # bytes read, or characters, at a time: one rare character makes each of a string's take 4 bytes
BLANK = " \t\r\n"
_END = r"(?>\r\n|\r|\n)"  # not U+2028 or U+0085, which are characters; never half of \r\n
CUTS = {"file": None, "line": re.compile(_END), "paragraph": re.compile(rf"{_END}(?:[ \t]*{_END})+")}


def suffix_of(file: Path) -> str:
    """The lower-case suffix that says what a file holds, without that of its compression."""
    name = file.name.lower()
    packed = Path(name).suffix in OPENERS
    return Path(Path(name).stem if packed else name).suffix


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed. Raises ValueError naming the file if they are damaged."""
    try:
        with OPENERS.get(file.suffix.lower(), open)(file, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: damaged ({error}): leave it out of the corpus") from error


def parts_of(file: Path) -> Iterator[str]:
    """A file's text in parts. Raises ValueError naming the file if it isn't UTF-8, or is damaged."""
    with _opened(file) as stream:
        yield from _decoded(file, iter(lambda: stream.read(PART), b""))


def lines(file: Path) -> Iterator[bytes]:
    """Lines that end in \\n, \\r\\n or \\r; JSON allows neither inside a string."""
    with _opened(file) as stream:
        for line in stream:
            yield from line.rstrip(b"\r\n").split(b"\r")


def decode(file: Path, data: bytes, where: str = "") -> str:
    """UTF-8 to text, without a byte order mark. Raises ValueError naming the file if it isn't UTF-8."""
    return "".join(_decoded(file, [data], where))


def _decoded(file: Path, blocks: Iterable[bytes], where: str = "") -> Iterator[str]:
    decoder, read, first = codecs.getincrementaldecoder("utf-8")(), 0, b""
    for data in itertools.chain(blocks, [b""]):
        first = first or data[:3]
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{file}{where}: UTF-16: convert it to UTF-8")
        if b"\0" in data:
            hint = "name it .gz" if first.startswith(b"\x1f\x8b") else "leave it out of the corpus"
            raise ValueError(f"{file}{where}: a binary file (it holds NUL bytes): {hint}")
        begin = read - len(decoder.getstate()[0])  # a character may lie across blocks
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            byte = begin + error.start
            raise ValueError(f"{file}{where}: not UTF-8 (byte {byte}): convert it or leave it out") from error
        if not begin and text.startswith("\ufeff"):
            text = text[1:]
        read += len(data)
        if text:
            yield text


def sliced(text: str, size: int = PART) -> Iterator[str]:
    """A text in parts of at most so many characters."""
    return (text[start : start + size] for start in range(0, len(text), size))


def whole_lines(text: Iterable[str], size: int) -> Iterator[str]:
    """A text in parts that end with lines, each as long as `size` characters allow; whole if it isn't longer.

    They don't depend on where the text is cut: a tokenizer's sums of scores round, so other parts may have other ids.
    """
    held, count, breaks, found = [], 0, False, False
    for part in text:
        held.append(part)
        count, breaks = count + len(part), breaks or "\n" in part
        if count <= size or not breaks:  # joining a long line at each part would take quadratic time
            continue
        joined, begin = "".join(held), 0
        while len(joined) - begin > size and (end := _line_end(joined, begin, size)):
            yield joined[begin:end]
            begin, found = end, True
        rest = joined[begin:]
        held, count, breaks = [rest], len(rest), "\n" in rest
    rest = "".join(held)
    end = rest.rfind("\n") + 1 if found else 0
    yield from filter(None, (rest[:end], rest[end:]))


def _line_end(text: str, begin: int, size: int) -> int:
    """After the last line end within so many characters, else after the next one; 0: there is none."""
    return text.rfind("\n", begin, begin + size) + 1 or text.find("\n", begin + size) + 1


def cut(text: Iterable[str], unit: str) -> Iterator[Iterable[str]]:
    """The documents of a text, each in parts. Nothing begins at the end of the last line.

    unit: a key of CUTS; a line or paragraph has no line ends around it.
    """
    ends = CUTS[unit]
    if ends is None:
        yield text
        return
    document, found = [], False
    for part in _between_ends(text):
        begin = 0
        for end in ends.finditer(part):
            yield _without_ends([*document, part[begin : end.start()]])
            document, begin, found = [], end.end(), True
        document.append(part[begin:])
    rest = _without_ends(document)
    if not found or any(rest):
        yield rest


def _between_ends(text: Iterable[str]) -> Iterator[str]:
    """The same text, cut only where no line end and no space between two of them is cut through."""
    held = []
    for part in text:
        body = part.rstrip(BLANK)
        if body:
            yield "".join([*held, body])
            held = []
        held.append(part[len(body) :])
    yield "".join(held)


def _without_ends(parts: list[str]) -> list[str]:
    """Without line ends at either end. Only the first and the last part may have some there."""
    if parts:
        parts[0] = parts[0].lstrip("\r\n")
        parts[-1] = parts[-1].rstrip("\r\n")
    return parts
