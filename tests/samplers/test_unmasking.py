"""How many positions a step commits, and which."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.canvas import denoised, recorded, step
from support.oracle import blank

from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import (
    ConstantCount,
    EntropyBound,
    EvenlyLeft,
    EvenlyOverCanvas,
    Factor,
    FixedCount,
    OverTime,
    Threshold,
)

VOCAB = MASK = 5
SCHEDULES = [FixedCount(), FixedCount(score="margin"), FixedCount(score="entropy"), Threshold(),
             Threshold(threshold=0.3), Factor(), EntropyBound(), EntropyBound(bound=2.0)]  # fmt: skip
rows = st.lists(st.floats(0.01, 0.999), min_size=1, max_size=7)


def counted(schedule, values):
    sure = jnp.asarray([sorted(values, reverse=True)], jnp.float32)
    return int(schedule.count(sure, jnp.full(1, len(values), jnp.int32), 1)[0])


@given(rows, st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=50)
def test_threshold_commits_all_above_it(values, least):
    assert counted(Threshold(threshold=least), values) == sum(np.float32(v) > np.float32(least) for v in values)


@given(rows, st.floats(0.1, 3.0))
@settings(deadline=None, max_examples=50)
def test_factor_commits_the_most_that_can_be_right_together(values, factor):
    p = np.sort(np.float32(values))[::-1]
    fits = [n for n in range(1, len(p) + 1) if np.float32(n + 1) * (1 - p[n - 1]) < np.float32(factor)]
    assert counted(Factor(factor=factor), values) == max(fits, default=0)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=7), st.integers(0, 20))
@settings(deadline=None, max_examples=50)
def test_entropy_bound_commits_while_those_before_fit(eighths, bound):
    """In eighths of a nat, so that sums are exact."""
    entropies = sorted(e / 8 for e in eighths)
    before = [0.0, *itertools.accumulate(entropies)][:-1]
    expected = sum(b <= bound / 8 for b in before)
    assert counted(EntropyBound(bound=bound / 8), [-e for e in entropies]) == expected


def said(tokens, t):
    """Logits that depend on the canvas: sharper as it fills."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(scale=2.0, size=(VOCAB + 1, tokens.shape[1], VOCAB)), jnp.float32)
    filled = jnp.sum(tokens != MASK, axis=1)
    mixed = jnp.sum(table[tokens, jnp.arange(tokens.shape[1])[None]], axis=1, keepdims=True)
    return mixed * (1 + filled[:, None, None]) + table[0][None]


def ragged():
    """Three rows, one with fixed positions."""
    return blank(3, 6, MASK, fixed=jnp.zeros((3, 6), bool).at[1, :2].set(True), prompt=1)


@pytest.mark.cases(4)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("passes", [1, 2, 4, 50])
def test_all_is_committed_in_time_and_at_least_one_a_step(schedule, passes):
    sampler = Confidence(denoising_steps=passes, eos=-1, schedule=schedule, sampling=SamplingParams())
    state, opened = recorded(sampler, said, ragged(), lambda s: jnp.sum(s.undecided, axis=1))
    assert not state.undecided.any() and (state.tokens < VOCAB).all() and (state.tokens[1, :2] == 1).all()
    assert state.step <= min(passes, 6)
    left = np.concatenate([[[6, 4, 6]], np.asarray(opened)[: int(state.step)]])
    assert ((np.diff(left, axis=0) < 0) | (left[1:] == 0)).all()


PAIRS = [
    (Threshold(threshold=0.1), Threshold(threshold=0.99)),
    (Factor(factor=5.0), Factor(factor=0.01)),
    (EntropyBound(bound=50.0), EntropyBound(bound=0.0)),
]


@pytest.mark.parametrize(("loose", "strict"), PAIRS, ids=str)
def test_a_looser_schedule_takes_fewer_steps(loose, strict):
    samplers = [Confidence(denoising_steps=6, eos=-1, schedule=schedule) for schedule in (loose, strict)]
    passes = [int(denoised(sampler, said, ragged()).step) for sampler in samplers]
    assert passes[0] < passes[1] and passes[0] <= 2


@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
def test_the_most_certain_by_each_score_goes_first(score):
    """Three positions, each the most certain by one score only."""
    p = np.array([[0.6, 0.399, 0.001, 0, 0], [0.5, 0.1, 0.1, 0.15, 0.15], [0.55, 0.15, 0.15, 0.15, 0]])
    first = {"probability": 0, "margin": 2, "entropy": 0}[score]
    sampler = Confidence(
        denoising_steps=3, eos=-1, schedule=FixedCount(score=score), sampling=SamplingParams(temperature=0.0)
    )
    logits = jnp.log(jnp.asarray(p, jnp.float32))[None]
    state = step(sampler, lambda tokens, t: logits, blank(1, 3, MASK))
    assert np.flatnonzero(~np.asarray(state.undecided)[0]).tolist() == [first]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Threshold(threshold=1.5),
        lambda: Factor(factor=0.0),
        lambda: EntropyBound(bound=-1.0),
        lambda: ConstantCount(count=0),
    ],
)
def test_impossible_values_are_refused(bad):
    with pytest.raises(ValueError, match=r"must|probability|at least 1"):
        bad()


# Least counts, and blocks of a canvas


def least(rule, undecided, width, steps):
    """How many positions each of so many steps commits."""
    found = []
    for made in range(steps):
        count = int(rule(jnp.full(1, undecided, jnp.int32), width, steps - made, steps)[0])
        found.append(count)
        undecided -= count
    return found, undecided


@pytest.mark.parametrize(
    ("rule", "undecided", "width", "steps", "expected"),
    [
        (EvenlyLeft(), 8, 8, 3, [3, 3, 2]),
        (EvenlyLeft(), 3, 8, 8, [1, 1, 1, 0, 0, 0, 0, 0]),
        (EvenlyOverCanvas(), 8, 8, 3, [3, 3, 2]),
        (EvenlyOverCanvas(), 5, 8, 3, [3, 2, 0]),  # three of the canvas are fixed: sooner, not slower
        (EvenlyOverCanvas(), 4, 4, 6, [1, 1, 1, 1, 0, 0]),
        (OverTime(), 4, 9, 4, [0, 1, 1, 2]),  # 4 / 4, 4 / 3, 3 / 2 and the rest, a little less each
        (OverTime(), 3, 9, 1, [3]),
        (ConstantCount(count=3), 7, 9, 4, [3, 3, 1, 0]),
    ],
    ids=str,
)
def test_least_counts(rule, undecided, width, steps, expected):
    assert least(rule, undecided, width, steps) == (expected, 0)


@pytest.mark.cases(3)
@pytest.mark.parametrize("steps", [3, 4, 11, 50])
@pytest.mark.parametrize("origin", ["canvas", "prompt"])
def test_blocks_are_committed_in_order_and_in_time(steps, origin):
    """11 positions in blocks of 4, one row with 2 fixed at its beginning."""
    canvas = blank(2, 11, MASK, fixed=jnp.zeros((2, 11), bool).at[1, :2].set(True), prompt=1)
    sampler = Confidence(denoising_steps=steps, eos=-1, block_length=4, block_origin=origin)
    state, undecided = recorded(sampler, said, canvas, lambda s: s.undecided)
    assert not state.undecided.any() and int(state.step) <= steps
    before = np.concatenate([np.asarray(canvas.undecided)[None], np.asarray(undecided)[: int(state.step)]])
    for was, now in itertools.pairwise(before):
        for row, start in enumerate([0, 2 if origin == "prompt" else 0]):
            if was[row].any():
                block = (np.arange(11) - start) // 4
                assert len({*block[was[row] & ~now[row]], block[np.argmax(was[row])]}) == 1


def test_certainty_may_be_measured_after_filtering():
    """At temperature 0 top-k 1 makes every position certain, and the leftmost goes first."""
    logits = jnp.asarray([[[1.0, 0, 0, 0, 0], [9.0, 0, 0, 0, 0]]])
    for filtered, first in ((False, 1), (True, 0)):
        sampling = SamplingParams(temperature=0.0, top_k=1)
        sampler = Confidence(denoising_steps=2, eos=-1, sampling=sampling, filtered_score=filtered)
        state = step(sampler, lambda tokens, t: logits, blank(1, 2, MASK))
        assert np.flatnonzero(~np.asarray(state.undecided)[0]).tolist() == [first]


def test_times_may_be_counted_upward():
    sampler = Confidence(denoising_steps=5, eos=-1, counted_times=4)
    canvas = blank(2, 5, MASK)
    times = [sampler.query(canvas.replace(step=jnp.asarray(step))).t[0] for step in range(5)]
    assert times == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_first_position_alone():
    sampler = Confidence(denoising_steps=7, eos=-1, schedule=Threshold(threshold=0.0), first_alone=True)
    state = step(sampler, said, ragged())
    assert np.asarray(~state.undecided).sum(axis=1).tolist() == [1, 6, 1]  # a fixed first position waits for nothing


def test_blocks_have_their_own_share_of_steps():
    with pytest.raises(ValueError, match="block_length goes with"):
        Confidence(denoising_steps=4, eos=-1, block_length=2, schedule=FixedCount(least=OverTime()))
