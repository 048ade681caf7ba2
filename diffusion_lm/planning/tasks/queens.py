"""N queens: complete a board on which no two queens attack each other. Few of the free squares lead to a solution."""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusion_lm.planning.tasks.base import Example, read_rows

COLUMNS = "123456789abc"


@dataclass(frozen=True, kw_only=True)
class Queens:
    """The queen's column in each row, 0 where the row is empty: `0200000084` -> `72a6195384` (1 to 9, a, b, c).

    Any completion is correct. Training and test share no prompt.

    size   rows and columns
    given  rows that the prompt fills
    """

    size: int = 10
    given: int = 3
    difficulty_unit = "completions of the board"

    def __post_init__(self):
        if not 4 <= self.size <= len(COLUMNS):
            raise ValueError(f"task.size must be 4 to {len(COLUMNS)}; got {self.size}")
        if not 0 <= self.given < self.size:
            raise ValueError(f"task.given must be 0 to {self.size - 1}; got {self.given}")

    @property
    def alphabet(self) -> str:
        return "0" + COLUMNS[: self.size]

    @property
    def max_lengths(self) -> tuple[int, int]:
        return self.size, self.size

    def draw(self, rng: random.Random) -> Example:
        answer = rng.choice(_boards(self.size))
        kept = set(rng.sample(range(self.size), self.given))
        return Example("".join(c if row in kept else "0" for row, c in enumerate(answer)), answer)

    def verify(self, prompt: str, answer: str) -> bool:
        if len(prompt) != self.size or len(answer) != self.size or not set(answer) <= set(COLUMNS[: self.size]):
            return False
        columns = [COLUMNS.index(c) for c in answer]
        lines = {(kind, c + slope * row) for row, c in enumerate(columns) for kind, slope in enumerate((0, 1, -1))}
        return len(lines) == 3 * self.size and all(p in ("0", c) for p, c in zip(prompt, answer, strict=True))

    def difficulty(self, example: Example) -> int:
        given = [(row, c) for row, c in enumerate(example.prompt) if c != "0"]
        return sum(all(board[row] == c for row, c in given) for board in _boards(self.size))

    def split_key(self, example: Example) -> str:
        return example.prompt

    def read(self, path: str | Path) -> list[Example]:
        return read_rows(self, path, "input", "output")


@functools.cache
def _boards(size: int) -> list[str]:
    """All solved boards: 2 of size 4, 724 of size 10, 14,200 of size 12."""
    return ["".join(COLUMNS[column] for column in columns) for columns in _completed(size, ())]


def _completed(size: int, placed: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All completions of a board whose first rows are placed."""
    row = len(placed)
    if row == size:
        yield placed
        return
    for column in range(size):
        if all(column != c and abs(column - c) != row - r for r, c in enumerate(placed)):
            yield from _completed(size, (*placed, column))
