"""Countdown: combine numbers, each used once, to a target ("Stream of Search", arXiv 2404.03683)."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from diffusion_lm.planning.tasks.base import Example, read_rows

TARGETS = range(10, 101)
MAX_RESULT = 9999  # of an intermediate equation
_EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)", re.ASCII)
_PROMPT = re.compile(r"[1-9]\d*(,[1-9]\d*)+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """`86,28,13,31,96` -> `86+28=114,31-13=18,114-18=96`: numbers from 1 to 99, then the target, 10 to 100.

    All results are positive integers. Training and test share no target.

    numbers  how many numbers there are beside the target, 2 to 9
    """

    numbers: int = 4
    alphabet = "0123456789,+-*/="
    difficulty_unit = "products and quotients"

    def __post_init__(self):
        if not 2 <= self.numbers <= 9:
            raise ValueError(f"task.numbers must be 2 to 9; got {self.numbers}")

    @property
    def max_lengths(self) -> tuple[int, int]:
        """Longer answers (a few with 4 and more numbers) are never drawn."""
        return 3 * self.numbers + 3, 12 * (self.numbers - 1) - 3

    def draw(self, rng: random.Random) -> Example:
        """Combines random numbers at random until the result is a possible target."""
        while True:
            numbers = rng.choices(range(1, 100), k=self.numbers)
            if (steps := _combined(rng, numbers)) and len(answer := ",".join(steps)) <= self.max_lengths[1]:
                target = answer.rpartition("=")[2]
                return Example(",".join(map(str, [*numbers, target])), answer)

    def verify(self, prompt: str, answer: str) -> bool:
        if not _PROMPT.fullmatch(prompt):
            return False
        *pool, target = map(int, prompt.split(","))
        steps = [_EQUATION.fullmatch(step) for step in answer.split(",")]
        if len(pool) != self.numbers or len(steps) != self.numbers - 1 or not all(steps):
            return False
        for step in steps:
            a, sign, b, c = int(step[1]), step[2], int(step[3]), int(step[4])
            if step[0] != f"{a}{sign}{b}={c}" or _results(a, b).get(sign) != c:
                return False
            for used in (a, b):
                if used not in pool:
                    return False
                pool.remove(used)
            pool.append(c)
        return pool == [target]

    def difficulty(self, example: Example) -> int:
        return sum(map(example.answer.count, "*/"))

    def split_key(self, example: Example) -> str:
        return example.prompt.rpartition(",")[2]

    def read(self, path: str | Path) -> list[Example]:
        return read_rows(self, path, "input", "output")


def _results(a: int, b: int) -> dict[str, int]:
    """Operator -> result of two numbers, where that is a positive integer."""
    found = {"+": a + b, "*": a * b}
    if a > b:
        found["-"] = a - b
    if b and a % b == 0:
        found["/"] = a // b
    return found


def _combined(rng: random.Random, numbers: list[int]) -> list[str] | None:
    """Random equations that use all numbers and end at a possible target; None if this try doesn't."""
    pool, steps = list(numbers), []
    while len(pool) > 1:
        i, j = sorted(rng.sample(range(len(pool)), 2))
        b, a = pool.pop(j), pool.pop(i)
        choices = [(a, sign, b, c) for sign, c in _results(a, b).items()]
        if a < b:
            choices += [(b, sign, a, c) for sign, c in _results(b, a).items() if sign in "-/"]
        a, sign, b, c = rng.choice(choices)
        if c > MAX_RESULT:
            return None
        steps.append(f"{a}{sign}{b}={c}")
        pool.append(c)
    return steps if pool[0] in TARGETS else None
