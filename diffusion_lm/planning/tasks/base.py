"""What a planning task is, and its examples: drawn without end by a seed, with some kept for testing only.

Which examples are a test's is a property of the example: of the hash of its task's `unseen`, whatever seed drew it. So
nothing that a test asks for can have been trained on, and no list has to be carried about.
"""

import csv
import hashlib
import itertools
import json
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

HELD = 10  # one of so many kinds of example is a test's
TRIES = 100_000  # draws before it is said that there is nothing more to draw


class Example(NamedTuple):
    """A prompt and one of its right answers."""

    prompt: str
    answer: str


class Task(Protocol):
    """A frozen dataclass whose fields are the difficulty.

    alphabet  the characters of prompts and answers
    longest   the most characters of a prompt, and of an answer
    measured  what `measure` counts, in a word or a few
    """

    measured: ClassVar[str]

    @property
    def alphabet(self) -> str: ...

    @property
    def longest(self) -> tuple[int, int]: ...

    def draw(self, rng: random.Random) -> Example:
        """A random example."""

    def verify(self, prompt: str, answer: str) -> bool:
        """Whether the answer is right, be it the example's own or another; False for what is no answer at all."""

    def measure(self, example: Example) -> int:
        """How hard an example is among those of one difficulty: a count of something, see `measured`."""

    def unseen(self, example: Example) -> str:
        """What a test example shares with no training example: its prompt, its target, its grid."""

    def read(self, path: str | Path) -> list[Example]:
        """The examples of a file in the public format. ValueError naming the line of one that isn't the task's."""


def examples(
    task: Task, seed: int, *, test: bool = False, avoid: Collection[int] = (), start: int = 0, step: int = 1
) -> Iterator[Example]:
    """Endless examples number start, start + step, ...: training's, or a test's. Nothing in `avoid` (see `keys`) comes.

    Each depends on its number and the seed alone, so hosts that take turns see together what one alone would see.
    """
    return (example(task, seed, index, test=test, avoid=avoid) for index in itertools.count(start, step))


def example(task: Task, seed: int, index: int, *, test: bool = False, avoid: Collection[int] = ()) -> Example:
    """Example number `index` of a seed. ValueError where none of TRIES draws is on the right side."""
    rng = random.Random(f"{seed}/{index}/{test}")
    for _ in range(TRIES):
        drawn = task.draw(rng)
        key = _key(task, drawn)
        if (key % HELD == 0) == test and key not in avoid:
            return drawn
    side = "test" if test else "training"
    raise ValueError(f"{task} has no {side} example in {TRIES} draws: make it less narrow")


def test_examples(task: Task, seed: int, count: int) -> list[Example]:
    """`count` test examples with different prompts. ValueError if there aren't so many."""
    found = {}
    for drawn in itertools.islice(examples(task, seed, test=True), 20 * count):
        found.setdefault(drawn.prompt, drawn)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{task} has about {len(found)} test examples, not {count}: ask for fewer")


def keys(task: Task, tests: Collection[Example]) -> frozenset[int]:
    """What training has to avoid so that it meets nothing of these tests."""
    return frozenset(_key(task, test) for test in tests)


def _key(task: Task, drawn: Example) -> int:
    return int.from_bytes(hashlib.sha256(task.unseen(drawn).encode()).digest()[:8])


def read_rows(task: Task, path: str | Path, prompt: str, answer: str) -> list[Example]:
    """The columns `prompt` and `answer` of a .csv file with a header or of a file of JSON lines, each row verified.

    FileNotFoundError, or ValueError naming the file and the row, counted from 1.
    """
    path, found = Path(path), []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file) if path.suffix == ".csv" else map(_record, file)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not {prompt, answer} <= row.keys():
                raise ValueError(f"{path}, row {number}: no {prompt!r} and {answer!r} in it; is it this task's file?")
            one = Example(str(row[prompt]), str(row[answer]))
            if not task.verify(*one):
                raise ValueError(f"{path}, row {number}: {one.answer} is no answer to {one.prompt} as {task} asks")
            found.append(one)
    if not found:
        raise ValueError(f"{path} holds no example")
    return found


def _record(line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
