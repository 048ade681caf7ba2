"""Sudoku: puzzles with one solution and the requested givens; full grids that training never sees."""

import itertools
import random

import pytest

from diffusion_lm.planning.tasks import base, sudoku
from diffusion_lm.planning.tasks.base import Example
from diffusion_lm.planning.tasks.sudoku import Sudoku, solutions

FOUR = Sudoku(size=4, least=4, most=8)


def drawn(task, count):
    return list(itertools.islice(base.examples(task, 0), count))


def test_there_are_288_grids_of_size_4():
    grids = list(solutions(4, "0" * 16))
    assert len(set(grids)) == len(grids) == 288
    assert all(FOUR.verify("0" * 16, grid) for grid in grids)


def test_the_search_finds_all_grids_of_size_4():
    """Against brute force over rows."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    right = {"".join(grid) for grid in itertools.product(rows, repeat=4) if FOUR.verify("0" * 16, "".join(grid))}
    assert right == set(solutions(4, "0" * 16))


def test_contradictory_givens_have_no_solution():
    assert list(solutions(4, "11" + "0" * 14)) == []
    assert list(solutions(4, "1230" + "0004" + "0" * 8)) == []


@pytest.mark.parametrize("task", [FOUR, Sudoku(size=6, least=9, most=14), Sudoku(), Sudoku(least=17, most=20)], ids=str)
def test_puzzles_have_one_solution_and_the_requested_givens(task):
    for prompt, answer in drawn(task, 8):
        assert task.least <= task.size**2 - prompt.count("0") <= task.most
        assert list(itertools.islice(solutions(task.size, prompt), 2)) == [answer]


def test_the_public_set_has_the_default_number_of_givens(shared):
    public = Sudoku().read(shared / "data/planning/sudoku_sample.csv")
    assert all(31 <= 81 - one.prompt.count("0") <= 36 for one in public)
    assert all(len(list(itertools.islice(solutions(9, one.prompt), 2))) == 1 for one in public[:10])


@pytest.mark.parametrize("size", sudoku.BOXES)
def test_a_symmetry_keeps_the_solution_and_the_invariant(size):
    rng, (puzzle, grid) = random.Random(0), sudoku.base_puzzle(size, 0, 3 * size)
    task, seen = Sudoku(size=size, least=3 * size, most=3 * size), set()
    for _ in range(50):
        turned, answer = sudoku.transform(rng, size, puzzle, grid)
        assert task.verify(turned, answer) and turned.count("0") == puzzle.count("0")
        assert sudoku.symmetry_invariant(size, answer) == sudoku.symmetry_invariant(size, grid)
        assert list(solutions(size, turned)) == [answer]
        seen.add(answer)
    assert len(seen) > 40


def test_puzzles_with_17_givens():
    for puzzle in sudoku.SEVENTEEN:
        assert 81 - puzzle.count("0") == 17 and len(list(itertools.islice(solutions(9, puzzle), 2))) == 1
    base.test_examples(Sudoku(least=17, most=22), 0, 1)  # some are in the test split


def test_the_invariant_differs_between_grids():
    assert len({sudoku.symmetry_invariant(9, sudoku.base_puzzle(9, number, 36)[1]) for number in range(30)}) > 25


def test_training_and_test_share_no_grid_of_size_4():
    """Training has most of the 288 grids and test the others."""
    tests = base.test_examples(FOUR, 1, 600)
    grids = {one.answer for one in tests}, {one.answer for one in drawn(FOUR, 4000)}
    assert not grids[0] & grids[1]
    assert len(grids[0] | grids[1]) > 280 and 15 < len(grids[0]) < 45


def test_a_transformed_test_grid_is_in_the_test_split_too():
    task = Sudoku(size=6, least=12, most=18)
    one = base.test_examples(task, 0, 1)[0]
    for seed in range(20):
        turned = Example(*sudoku.transform(random.Random(seed), 6, *one))
        assert base.split_hash(task, turned) in base.split_hashes(task, [one])
