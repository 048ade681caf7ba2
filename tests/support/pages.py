"""The documentation as data: fenced blocks, commands, and what is written in backticks."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ("config.md", "cli.md")
NOT_RUN = re.compile(r"<!-- not run by the tests: (.+) -->")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; `skipped` is the reason why tests don't run it, or empty."""

    language: str
    text: str
    skipped: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        before = text[: found.start()].rstrip().rpartition("\n")[2]
        reason = NOT_RUN.fullmatch(before)
        yield Block(found["language"], found["text"], reason[1] if reason else "")


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";")), len(words))
            yield words[:end]
            words = words[end + 1 :]


def launches(text: str) -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of every `python -m launch...` in a shell text, also of those inside quotes."""
    for words in commands(text):
        if "-m" in words and re.fullmatch(r"launch\.[a-z_.]+", module := words[words.index("-m") + 1]):
            yield module, words[words.index("-m") + 2 :]
        else:
            yield from (found for word in words if "-m launch." in word for found in launches(word.partition("=")[2]))


def inline(page: Path) -> Iterator[str]:
    """What stands in single backticks."""
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


def all_launches(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Of a page's shell blocks and of commands in backticks."""
    for block in blocks(page):
        if block.language == "sh":
            yield from launches(block.text)
    yield from (found for code in inline(page) if code.startswith("python -m launch.") for found in launches(code))


def example(file: str) -> dict:
    """The names that a file of docs/extending.md defines."""
    (code,) = [b.text for b in blocks(ROOT / "docs/extending.md") if b.text.startswith(f"# {file}\n")]
    names = {"__name__": file.removesuffix(".py").replace("/", ".")}
    exec(compile(code, file, "exec"), names)
    return names
