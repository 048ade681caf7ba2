"""What a planning task is, and how its endless examples are split into training and test.

The split is a property of the example: a hash of the task's `split_key` decides, whatever seed generated it. So a test
example can't have been trained on, and no list of them has to be stored.
"""

import csv
import hashlib
import itertools
import json
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

TEST_ONE_IN = 10  # one of so many split keys belongs to the test split
MAX_TRIES = 100_000  # draws before an example of a split is given up


class Example(NamedTuple):
    """A prompt and one of its correct answers."""

    prompt: str
    answer: str


class Task(Protocol):
    """A frozen dataclass whose fields set the difficulty.

    alphabet         the characters of prompts and answers
    max_lengths      the most characters of a prompt, and of an answer
    difficulty_unit  what `difficulty` counts, for tables and axes
    """

    difficulty_unit: ClassVar[str]

    @property
    def alphabet(self) -> str: ...

    @property
    def max_lengths(self) -> tuple[int, int]: ...

    def draw(self, rng: random.Random) -> Example:
        """A random example."""

    def verify(self, prompt: str, answer: str) -> bool:
        """Whether the answer is correct, be it the example's own or another; False for malformed text."""

    def difficulty(self, example: Example) -> int:
        """How hard an example is among those of this task: a count, see `difficulty_unit`."""

    def split_key(self, example: Example) -> str:
        """What training and test examples never share: the prompt, the target or the grid, by task."""

    def read(self, path: str | Path) -> list[Example]:
        """The examples of a file in the public format. ValueError naming the first row that isn't the task's."""


def examples(
    task: Task, seed: int, *, test: bool = False, exclude: Collection[int] = (), start: int = 0, step: int = 1
) -> Iterator[Example]:
    """Endless examples number start, start + step, ... of the training or the test split.

    Each depends on the seed and its number alone, so hosts that take turns see together what one would see alone.

    Args:
      task: what to generate.
      seed: of the random numbers.
      test: the test split instead of the training split.
      exclude: `split_hashes` of examples to leave out.
      start: number of the first example.
      step: distance to the next number.
    """
    return (example(task, seed, index, test=test, exclude=exclude) for index in itertools.count(start, step))


def example(task: Task, seed: int, index: int, *, test: bool = False, exclude: Collection[int] = ()) -> Example:
    """Example number `index` of a seed. ValueError if none of MAX_TRIES draws is in the split."""
    rng = random.Random(f"{seed}/{index}/{test}")
    for _ in range(MAX_TRIES):
        drawn = task.draw(rng)
        value = split_hash(task, drawn)
        if (value % TEST_ONE_IN == 0) == test and value not in exclude:
            return drawn
    split = "test" if test else "training"
    raise ValueError(f"{task} has no {split} example in {MAX_TRIES} draws: choose a less narrow difficulty")


def test_examples(task: Task, seed: int, count: int) -> list[Example]:
    """`count` test examples with different prompts. ValueError if there aren't so many."""
    found = {}
    for drawn in itertools.islice(examples(task, seed, test=True), 20 * count):
        found.setdefault(drawn.prompt, drawn)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{task} has about {len(found)} test examples, not {count}: ask for fewer")


def split_hashes(task: Task, tests: Collection[Example]) -> frozenset[int]:
    """What `examples` must exclude so that training shares no split key with these tests."""
    return frozenset(split_hash(task, test) for test in tests)


def split_hash(task: Task, drawn: Example) -> int:
    """The hash of an example's split key, which decides its split."""
    return int.from_bytes(hashlib.sha256(task.split_key(drawn).encode()).digest()[:8])


def read_rows(task: Task, path: str | Path, prompt: str, answer: str) -> list[Example]:
    """The columns `prompt` and `answer` of a .csv file with a header, or of a JSON Lines file, each row verified.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: naming the file and the first wrong row, counted from 1.
    """
    path, found = Path(path), []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file) if path.suffix == ".csv" else map(_record, file)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not {prompt, answer} <= row.keys():
                raise ValueError(f"{path}, row {number}: {prompt!r} or {answer!r} is missing; is it this task's file?")
            one = Example(str(row[prompt]), str(row[answer]))
            if not task.verify(*one):
                raise ValueError(f"{path}, row {number}: {one.answer} does not solve {one.prompt} of {task}")
            found.append(one)
    if not found:
        raise ValueError(f"{path} holds no example")
    return found


def _record(line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
