"""Second thoughts, counted on histories made up by hand and at random."""

import numpy as np
import pytest

from diffusion_lm.planning.remasking_stats import TakeBacks, recorded, take_backs
from diffusion_lm.samplers.base import Generation, History

M = 9  # the mask


def frames(*positions):
    """One row: each argument is what stood at a position after each pass."""
    return np.array(positions).T[None]


def test_each_fate_of_a_position_is_counted_where_it_belongs():
    text = frames(
        [M, 1, 1, 1],  # stays
        [2, M, 1, 1],  # wrong, right
        [1, 1, M, 2],  # right, wrong
        [2, 3, 3, 3],  # wrong, wrong
        [1, M, M, 1],  # right again
        [2, 1, 2, 2],  # wrong after all
        [M, M, M, M],  # never written
        [M, 2, 3, 1],  # doesn't matter
    )
    right = np.array([[1, 1, 1, 1, 1, 1, 1, M]])
    found = take_backs(text, right, M)
    assert found == TakeBacks(positions=6, times=1 + 1 + 1 + 1 + 2, mended=1, spoiled=1, other=1, wrong=3, doubted=3)


def test_mended_less_spoiled_is_what_was_gained():
    rng = np.random.default_rng(0)
    text = rng.choice([0, 1, 2, M], (50, 6, 7))
    text[:, -1] = rng.integers(0, 3, (50, 7))  # no mask is left
    right = rng.integers(0, 3, (50, 7))
    found = take_backs(text, right, M)
    first = np.array([[next(t for t in text[r, :, i] if t != M) for i in range(7)] for r in range(50)])
    assert found.mended - found.spoiled == (text[:, -1] == right).sum() - (first == right).sum()
    assert found.wrong == (first != right).sum() and found.mended + found.other <= found.doubted <= found.wrong
    assert found.positions == 350 and found.mended + found.spoiled + found.other <= found.times
    halves = take_backs(text[:20], right[:20], M) + take_backs(text[20:], right[20:], M)
    assert halves == found


def test_nothing_is_taken_back_of_what_stays():
    text = np.where(np.arange(5)[None, :, None] >= np.arange(4)[None, None, :], 1, M)
    assert take_backs(text, np.full((1, 4), 2), M) == TakeBacks(4, 0, 0, 0, 0, 4, 0)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"give \[rows, passes, n\]"):
        take_backs(np.zeros((2, 3, 4)), np.zeros((2, 3)), M)


def generation(tokens, start, made):
    history = History(tokens=np.array(tokens), confidence=None, start=np.array(start), made=np.array(made))
    return Generation(tokens=None, length=None, nfe=None, cache=None, history=history)


def test_canvases_are_laid_one_behind_the_other_and_prompts_left_out():
    """Two rows with prompts of 1 and 2; the second row's first canvas begins inside its prompt."""
    first = [[[M, M], [7, M]], [[1, M], [7, 2]], [[M, M], [M, M]]]  # the third pass wasn't made
    second = [[[3, M], [4, M]], [[3, 3], [4, M]], [[3, 3], [4, 5]]]
    made = generation([first, second], [[1, 1], [3, 3]], [2, 3])
    text = recorded(made, [np.array([8]), np.array([8, 7])], 3, M)
    assert text[0].tolist() == [[M, M, M], [1, M, M], [1, M, 3], [1, M, 3], [1, M, 3]]
    assert text[1].tolist() == [[M, M, M], [2, M, M], [2, 4, M], [2, 4, M], [2, 4, 5]]


def test_no_history():
    with pytest.raises(ValueError, match="no history"):
        recorded(Generation(tokens=None, length=None, nfe=None, cache=None), [], 3, M)
