"""Sudoku: every row, column and box holds each digit once."""

import functools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusion_lm.planning.tasks.base import Example, read_rows

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
PUZZLES = 1000  # base puzzles found by search; each yields all puzzles that a symmetry maps it to
MIN_GIVENS = {4: 4, 6: 9, 9: 17}  # that removing digits can be asked for
SEARCHABLE = 23  # givens of 81: with fewer, removing digits at random takes too many tries
# Puzzles with 17 givens, the fewest with a unique solution. Removing digits at random never finds one.
SEVENTEEN = (
    "000000010400000000020000000000050407008000300001090000300400200050100000000806000",
    "000000010400000000020000000000050604008000300001090000300400200050100000000807000",
    "000000012000035000000600070700000300000400800100000000000120000080000040050000600",
    "000000012003600000000007000410020000000500300700000600280000040000300500000000000",
    "000000012008030000000000040120500000000004700060000000507000300000620000000100000",
    "000000012040050000000009000070600400000100000000000050000087500601000300200000000",
    "000000012050400000000000030700600400001000000000080000920000800000510700000003000",
    "000000012300000060000040000900000500000001070020000000000350400001400800060000000",
    "000000012400090000000000050070200000600000400000108000018000000000030700502000000",
    "000000012500008000000700000600120000700000450000030000030000800000500700020000000",
)


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """The grid row by row, 0 for a blank -> the full grid. Each puzzle has one solution.

    A base puzzle is found by removing digits, then some digits are added and a random symmetry is applied: digits
    renamed, rows, columns and bands permuted, the grid transposed. With less than 23 givens of 81, all base puzzles
    are ten with 17 givens. Training and test share no full grid of 4 x 4 (there are 288); of larger sizes, no grid
    that a symmetry maps to the other.

    size         digits, and rows and columns: 4, 6 or 9
    least, most  number of givens
    """

    size: Literal[4, 6, 9] = 9
    least: int = 31
    most: int = 36
    difficulty_unit = "blanks"

    def __post_init__(self):
        if self.size not in BOXES:
            raise ValueError(f"task.size must be 4, 6 or 9; got {self.size}")
        if not MIN_GIVENS[self.size] <= self.least <= self.most < self.size**2:
            bounds = f"{MIN_GIVENS[self.size]} to {self.size**2 - 1}"
            raise ValueError(f"task.least={self.least} and task.most={self.most} must be {bounds} givens, least first")

    @property
    def alphabet(self) -> str:
        return "0123456789"[: self.size + 1]

    @property
    def max_lengths(self) -> tuple[int, int]:
        return self.size**2, self.size**2

    def draw(self, rng: random.Random) -> Example:
        givens = rng.randint(self.least, self.most)
        if self.size == 9 and self.least < SEARCHABLE:
            puzzle = rng.choice(SEVENTEEN)
            grid = _solution(puzzle)
        else:
            puzzle, grid = base_puzzle(self.size, rng.randrange(PUZZLES), self.least)
        blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
        given = set(rng.sample(blanks, givens - (len(grid) - len(blanks))))
        puzzle = "".join([grid[cell] if cell in given else digit for cell, digit in enumerate(puzzle)])
        return Example(*transform(rng, self.size, puzzle, grid))

    def verify(self, prompt: str, answer: str) -> bool:
        if len(prompt) != self.size**2 or len(answer) != self.size**2:
            return False
        if any(p not in ("0", a) for p, a in zip(prompt, answer, strict=True)):
            return False
        digits = set("123456789"[: self.size])
        return all({answer[cell] for cell in unit} == digits for unit in _units(self.size))

    def difficulty(self, example: Example) -> int:
        return example.prompt.count("0")

    def scratchpad(self, example: Example) -> str:
        """The grid after half of the deduction rounds, rounded up (see `_rounds`)."""
        rounds = _rounds(self.size, *example)
        half = (max(rounds) + 1) // 2
        return "".join([digit if when <= half else "0" for digit, when in zip(example.answer, rounds, strict=True)])

    def split_key(self, example: Example) -> str:
        return example.answer if self.size == 4 else symmetry_invariant(self.size, example.answer)

    def read(self, path: str | Path) -> list[Example]:
        return read_rows(self, path, "quizzes", "solutions")


# ---- grids ----


@functools.cache
def _units(size: int) -> tuple[tuple[int, ...], ...]:
    """The cells of each row, column and box."""
    high, wide = BOXES[size]
    rows = [tuple(range(r * size, (r + 1) * size)) for r in range(size)]
    columns = [tuple(range(c, size * size, size)) for c in range(size)]
    corners = [(r, c) for r in range(0, size, high) for c in range(0, size, wide)]
    boxes = [tuple((r + i) * size + c + j for i in range(high) for j in range(wide)) for r, c in corners]
    return *rows, *columns, *boxes


@functools.cache
def _units_of(size: int) -> tuple[tuple[int, int, int], ...]:
    """The row, column and box of each cell, as indices of units."""
    units = _units(size)
    return tuple(tuple(u for u, unit in enumerate(units) if cell in unit) for cell in range(size * size))


def solutions(size: int, puzzle: str, rng: random.Random | None = None) -> Iterator[str]:
    """All solutions of a puzzle, in order of digits or, with a generator, in random order."""
    units_of, free = _units_of(size), [(1 << size) - 1] * (3 * size)
    cells = [0] * size**2
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            bit = 1 << int(digit) - 1
            if not all(free[unit] & bit for unit in units_of[cell]):
                return
            _toggle(free, units_of[cell], bit)
            cells[cell] = bit
    yield from _filled(cells, [cell for cell, bit in enumerate(cells) if not bit], free, units_of, rng)


def _filled(cells, blanks, free, units_of, rng) -> Iterator[str]:
    """Backtracking: fills the cell with fewest candidates, or a digit with one place left in a unit."""
    if not blanks:
        yield "".join(str(bit.bit_length()) for bit in cells)
        return
    candidates = {cell: free[units_of[cell][0]] & free[units_of[cell][1]] & free[units_of[cell][2]] for cell in blanks}
    best = min(candidates, key=lambda cell: candidates[cell].bit_count())
    if candidates[best].bit_count() > 1:
        best, candidates[best] = _only_place(candidates, free, units_of) or (best, candidates[best])
    bits = [1 << i for i in range(9) if candidates[best] >> i & 1]
    if rng:
        rng.shuffle(bits)
    rest = [cell for cell in blanks if cell != best]
    for bit in bits:
        _toggle(free, units_of[best], bit)
        cells[best] = bit
        yield from _filled(cells, rest, free, units_of, rng)
        _toggle(free, units_of[best], bit)
        cells[best] = 0


def _only_place(candidates, free, units_of) -> tuple[int, int] | None:
    """(cell, bit) of a digit that fits only one cell of a unit; (any cell, 0) if it fits none."""
    once, twice = [0] * len(free), [0] * len(free)
    for cell, bits in candidates.items():
        for unit in units_of[cell]:
            twice[unit] |= once[unit] & bits
            once[unit] |= bits
    for unit, missing in enumerate(free):
        if missing & ~once[unit]:
            return next(iter(candidates)), 0
        if single := once[unit] & ~twice[unit]:
            bit = single & -single
            return next(c for c, bits in candidates.items() if bits & bit and unit in units_of[c]), bit
    return None


def _rounds(size: int, puzzle: str, grid: str) -> list[int]:
    """The deduction round that fills each cell of a puzzle: 0 for a given.

    A round fills the cells that have one candidate, or are a digit's only place in a unit, given the rounds before.
    Cells that no round can deduce share the last one.
    """
    units, units_of = _units(size), _units_of(size)
    rounds, standing, number = [0 if digit != "0" else None for digit in puzzle], list(puzzle), 0
    while None in rounds:
        number += 1
        candidates = {
            cell: set(grid) - {standing[i] for unit in units_of[cell] for i in units[unit]}
            for cell, when in enumerate(rounds)
            if when is None
        }
        places = [Counter(d for cell in unit for d in candidates.get(cell, ())) for unit in units]
        found = [
            cell
            for cell, digits in candidates.items()
            if len(digits) == 1 or any(places[unit][grid[cell]] == 1 for unit in units_of[cell])
        ]
        for cell in found or candidates:
            rounds[cell], standing[cell] = number, grid[cell]
    return rounds


def _toggle(free: list[int], units: tuple[int, int, int], bit: int) -> None:
    for unit in units:
        free[unit] ^= bit


# ---- puzzles ----


@functools.cache
def _solution(puzzle: str) -> str:
    return next(solutions(9, puzzle))


@functools.cache
def base_puzzle(size: int, number: int, least: int) -> tuple[str, str]:
    """A puzzle of at most `least` givens with a unique solution, and the solution."""
    rng = random.Random(f"puzzle {size} {number}")
    while True:
        grid = next(solutions(size, "0" * size**2, rng))
        puzzle = list(grid)
        for cell in rng.sample(range(size**2), size**2):
            digit, puzzle[cell] = puzzle[cell], "0"
            if _another(size, puzzle, cell, digit):
                puzzle[cell] = digit
        if size**2 - puzzle.count("0") <= least:
            return "".join(puzzle), grid


def _another(size: int, puzzle: list[str], cell: int, digit: str) -> bool:
    """Whether a solution has another digit in a cell."""
    trial = list(puzzle)
    for other in "123456789"[:size]:
        if other != digit:
            trial[cell] = other
            if next(solutions(size, "".join(trial)), None):
                return True
    return False


def transform(rng: random.Random, size: int, *grids: str) -> list[str]:
    """The grids under one random symmetry of sudoku."""
    high, wide = BOXES[size]
    rows, columns = _lines(rng, size, high), _lines(rng, size, wide)
    cells = [row * size + column for row in rows for column in columns]
    if high == wide and rng.random() < 0.5:
        cells = [column * size + row for row in rows for column in columns]
    digits = list(range(1, size + 1))
    rng.shuffle(digits)
    names = "0" + "".join(map(str, digits))
    return ["".join([names[int(grid[cell])] for cell in cells]) for grid in grids]


def _lines(rng: random.Random, size: int, together: int) -> list[int]:
    """Rows (or columns) permuted so that those of a box stay together."""
    bands = rng.sample(range(size // together), size // together)
    return [band * together + line for band in bands for line in rng.sample(range(together), together)]


def symmetry_invariant(size: int, grid: str) -> str:
    """A text that no symmetry changes: cycle lengths of the digits' permutations between lines of a band."""
    high, wide = BOXES[size]
    units = _units(size)
    sides = [_cycles(grid, units[:size], high), _cycles(grid, units[size : 2 * size], wide)]
    return " / ".join(sorted(sides) if high == wide else sides)


def _cycles(grid: str, lines: tuple[tuple[int, ...], ...], together: int) -> str:
    """The cycle lengths over all pairs of lines in a band, counted."""
    found = Counter()
    for a in range(len(lines)):
        for b in range(a + 1, a - a % together + together):
            after = {grid[i]: grid[j] for i, j in zip(lines[a], lines[b], strict=True)}
            lengths = []
            while after:
                first, at = next(iter(after.items()))
                del after[first]
                length = 1
                while at != first:
                    at, length = after.pop(at), length + 1
                lengths.append(length)
            found["+".join(map(str, sorted(lengths)))] += 1
    return " ".join(f"{count}x{cycles}" for cycles, count in sorted(found.items()))
