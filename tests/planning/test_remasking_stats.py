"""Changes of committed tokens, counted on hand-made and random histories."""

import numpy as np
import pytest

from diffusion_lm.planning.remasking_stats import RemaskingStats, answer_history, remasking_stats
from diffusion_lm.samplers.base import Generation, History

M = 9  # the mask


def frames(*positions):
    """One row: each argument holds a position's tokens after each denoising step."""
    return np.array(positions).T[None]


def test_each_outcome_of_a_position_is_counted():
    text = frames(
        [M, 1, 1, 1],  # never changed
        [2, M, 1, 1],  # wrong, then correct
        [1, 1, M, 2],  # correct, then wrong
        [2, 3, 3, 3],  # wrong, then wrong with another token
        [1, M, M, 1],  # correct, masked, correct
        [2, 1, 2, 2],  # wrong, correct, wrong
        [M, M, M, M],  # never committed
        [M, 2, 3, 1],  # doesn't count
    )
    right = np.array([[1, 1, 1, 1, 1, 1, 1, M]])
    found = remasking_stats(text, right, M)
    assert found == RemaskingStats(
        positions=6, changes=1 + 1 + 1 + 1 + 2, corrected=1, broken=1, still_wrong=1, first_wrong=3, wrong_remasked=3
    )


def test_corrected_minus_broken_is_the_gain_in_correct_positions():
    rng = np.random.default_rng(0)
    text = rng.choice([0, 1, 2, M], (50, 6, 7))
    text[:, -1] = rng.integers(0, 3, (50, 7))  # everything is committed
    right = rng.integers(0, 3, (50, 7))
    found = remasking_stats(text, right, M)
    first = np.array([[next(t for t in text[r, :, i] if t != M) for i in range(7)] for r in range(50)])
    assert found.corrected - found.broken == (text[:, -1] == right).sum() - (first == right).sum()
    assert found.first_wrong == (first != right).sum()
    assert found.corrected + found.still_wrong <= found.wrong_remasked <= found.first_wrong
    assert found.positions == 350 and found.corrected + found.broken + found.still_wrong <= found.changes
    halves = remasking_stats(text[:20], right[:20], M) + remasking_stats(text[20:], right[20:], M)
    assert halves == found


def test_a_token_that_stays_is_never_counted_as_changed():
    text = np.where(np.arange(5)[None, :, None] >= np.arange(4)[None, None, :], 1, M)
    assert remasking_stats(text, np.full((1, 4), 2), M) == RemaskingStats(4, 0, 0, 0, 0, 4, 0)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"give \[rows, steps, n\]"):
        remasking_stats(np.zeros((2, 3, 4)), np.zeros((2, 3)), M)


def generation(tokens, start, made):
    history = History(tokens=np.array(tokens), confidence=None, start=np.array(start), steps=np.array(made))
    return Generation(tokens=None, length=None, nfe=None, cache=None, history=history)


def test_an_answer_history_joins_canvases_and_leaves_prompts_out():
    """Two rows with prompts of 1 and 2; the second row's first canvas begins inside its prompt."""
    first = [[[M, M], [7, M]], [[1, M], [7, 2]], [[M, M], [M, M]]]  # the third step wasn't made
    second = [[[3, M], [4, M]], [[3, 3], [4, M]], [[3, 3], [4, 5]]]
    made = generation([first, second], [[1, 1], [3, 3]], [2, 3])
    text = answer_history(made, [np.array([8]), np.array([8, 7])], 3, M)
    assert text[0].tolist() == [[M, M, M], [1, M, M], [1, M, 3], [1, M, 3], [1, M, 3]]
    assert text[1].tolist() == [[M, M, M], [2, M, M], [2, 4, M], [2, 4, M], [2, 4, 5]]


def test_a_generation_without_history_is_refused():
    with pytest.raises(ValueError, match="no history"):
        answer_history(Generation(tokens=None, length=None, nfe=None, cache=None), [], 3, M)
