"""The difficulty of an example, and the scratchpad before its answer."""

import itertools

import pytest

from diffusion_lm.planning.tasks import base
from diffusion_lm.planning.tasks.base import Example
from diffusion_lm.planning.tasks.countdown import Countdown
from diffusion_lm.planning.tasks.path import PathPlanning
from diffusion_lm.planning.tasks.queens import Queens
from diffusion_lm.planning.tasks.satisfiability import Satisfiability
from diffusion_lm.planning.tasks.scratchpad import Scratchpad
from diffusion_lm.planning.tasks.sudoku import Sudoku

FOUR = Sudoku(size=4, least=4, most=8)


def drawn(task, count=40, **where):
    return list(itertools.islice(base.examples(task, 0, **where), count))


@pytest.mark.parametrize(
    ("task", "example", "difficulty"),
    [
        (Countdown(), Example("86,28,13,31,96", "86+28=114,31-13=18,114-18=96"), 0),
        (Countdown(numbers=3), Example("3,5,2,16", "5+3=8,8*2=16"), 1),
        (FOUR, Example("1234341200000000", "1234341221434321"), 8),
        (PathPlanning(nodes=5, length=3), Example("0,1/1,2/3,1/1,4-0,4", "0,1/1,4"), 1),
        (PathPlanning(nodes=5, length=3), Example("0,1/1,2/0,3/3,4-0,4", "0,3/3,4"), 2),
        (PathPlanning(nodes=5, length=3), Example("0,1/1,4/2,3/3,4-0,4", "0,1/1,4"), 0),
        (Queens(size=6, given=0), Example("000000", "246135"), 4),
        (Queens(size=6, given=1), Example("200000", "246135"), 1),
        (Satisfiability(variables=3, clauses=2), Example("1,2,3/1,2,8", "1,7,3"), 6),
    ],
)
def test_difficulty(task, example, difficulty):
    assert task.verify(*example) and task.difficulty(example) == difficulty


@pytest.mark.parametrize("task", [FOUR, PathPlanning()], ids=str)
def test_a_scratchpad_fills_a_canvas_before_the_answer(task):
    worked = Scratchpad(task=task)
    for plain, one in zip(drawn(task), drawn(worked), strict=True):  # the same examples, in the same order
        assert one.prompt == plain.prompt and worked.verify(*one) and worked.split_key(one) == task.split_key(plain)
        work, answer = one.answer[: worked.canvas], one.answer[worked.canvas :]
        assert (
            answer == plain.answer
            and work.rstrip(".") == task.scratchpad(plain)
            and len(work) == task.max_lengths[1] + 1
        )
        assert worked.verify(one.prompt, "?" * worked.canvas + answer)  # the scratchpad isn't verified
        assert not worked.verify(one.prompt, answer) and not worked.verify(one.prompt, work + answer[:-1])
        assert worked.difficulty(one) == task.difficulty(plain)
        assert set(one.answer) <= set(worked.alphabet) and len(one.answer) <= worked.max_lengths[1]
    assert drawn(worked, 5, test=True)[0].prompt == drawn(task, 5, test=True)[0].prompt


def test_a_sudoku_s_scratchpad_holds_half_of_the_deduction_rounds():
    grid = "1234341221434321"
    assert FOUR.scratchpad(Example("0234341221434321", grid)) == grid  # one round
    # Three rounds: the first row's 3 depends on its neighbours, which depend on cells below them.
    assert FOUR.scratchpad(Example("0001000420100300", "4231312424131342")) == "4201312424131342"
    for one in drawn(FOUR):
        work = FOUR.scratchpad(one)
        assert all(w in ("0", a) and (p == "0" or p == w) for p, w, a in zip(one.prompt, work, one.answer, strict=True))
    assert any(FOUR.scratchpad(one) != one.prompt for one in drawn(FOUR))


def test_a_path_s_scratchpad_goes_from_the_goal_to_the_shared_node():
    task = PathPlanning(nodes=5, length=3)
    assert task.scratchpad(Example("0,1/1,2/3,1/1,4-0,4", "0,1/1,4")) == "4,1"
    assert task.scratchpad(Example("0,1/1,2/0,3/3,4-0,4", "0,3/3,4")) == "4,3,0"
    assert task.scratchpad(Example("0,1/1,4/2,3/3,4-0,4", "0,1/1,4")) == "4"
