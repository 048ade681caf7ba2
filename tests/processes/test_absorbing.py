"""The absorbing process: its noise, its weights, and its way back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chain
from support.oracle import LENGTH, MASK, TEXTS, VOCAB, conditionals, p_value, truth

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import broadcast_times
from diffusion_lm.schedules import Cosine, Geometric, Linear, Polynomial

SCHEDULES = [Linear(), Cosine(), Polynomial(power=2.0), Polynomial(power=0.5), Geometric()]


@pytest.fixture(params=SCHEDULES, ids=str)
def process(request):
    return Absorbing(schedule=request.param, mask=MASK)


def test_prior_is_all_mask(process):
    assert (process.prior(jax.random.key(0), (2, 5)) == MASK).all()


def test_corrupt_keeps_a_token_with_probability_alpha(process):
    t = jnp.array([[0.1, 0.5, 0.9, 1.0]])
    x0 = jnp.tile(jnp.arange(8, dtype=jnp.int32)[None] % VOCAB, (20_000, 1))
    xt = process.corrupt(jax.random.key(1), x0, jnp.broadcast_to(t, (20_000, 4)))
    changed = xt == MASK
    assert (jnp.where(changed, x0, xt) == x0).all()
    alpha = np.repeat(process.schedule.alpha(t[0]), 2)
    np.testing.assert_allclose((~changed).mean(axis=0), alpha, atol=4 * 0.5 / np.sqrt(20_000))
    assert (xt[:, 6:] == MASK).all()  # nothing is left at t = 1


def test_positions_are_noised_independently(process):
    x0 = jnp.zeros((20_000, 2), jnp.int32)
    changed = process.corrupt(jax.random.key(2), x0, jnp.full((20_000, 1), 0.5)) == MASK
    assert abs(np.corrcoef(np.asarray(changed).T)[0, 1]) < 4 / np.sqrt(20_000)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_fixed_count_of_each_span_is_masked_and_all_subsets_alike(schedule):
    process = Absorbing(schedule=schedule, fixed_count=True, mask=MASK)
    t = jnp.tile(jnp.array([[1e-6, 0.45, 1.0]]), (6_000, 1))
    masked = np.asarray(process.corrupt(jax.random.key(2), jnp.zeros((6_000, 12), jnp.int32), t) == MASK)
    masked = masked.reshape(6_000, 3, 4)
    counts = np.clip(np.ceil(schedule.one_minus_alpha(t[0]) * 4), 1, 4)
    assert (masked.sum(axis=2) == counts).all()
    subsets, found = np.unique(masked[:, 1], axis=0, return_counts=True)
    assert len(subsets) == math.comb(4, int(counts[1]))
    expected = 6_000 / len(subsets)
    assert ((found - expected) ** 2 / expected).sum() < 5 * len(subsets)  # chi-squared


def test_nothing_is_noised_at_0(process):
    x0 = jnp.zeros((100, 50), jnp.int32)
    assert (process.corrupt(jax.random.key(3), x0, jnp.zeros((100, 1))) == x0).all()


def test_reveal_probability_is_bayes(process):
    t, s = jnp.array([0.9, 0.5, 1.0, 0.25]), jnp.array([0.7, 0.25, 0.5, 0.0])
    alpha = process.schedule.alpha
    masked_at_t, masked_at_s = 1 - alpha(t), 1 - alpha(s)  # masked at s implies masked at t
    np.testing.assert_allclose(1 - process.reveal_probability(t, s), masked_at_s / masked_at_t, atol=2e-6)


def test_all_is_revealed_at_0(process):
    t = jnp.array([1.0, 0.5, 1e-3, 1e-9])
    assert (process.reveal_probability(t, jnp.zeros(4)) == 1).all()


def test_rate_is_the_limit_of_steps(process):
    t = jnp.array([0.2, 0.5, 0.8])
    h = 1e-3
    limit = process.step_weight(t + h / 2, t - h / 2) / h
    np.testing.assert_allclose(process.rate_weight(t), limit, rtol=1e-2)


@pytest.mark.cases(2)
def test_reverse_moves_masks_only_and_at_the_stated_rate(process):
    rows = 20_000
    keys = jax.random.split(jax.random.key(4), rows)
    xt = jnp.tile(jnp.array([[1, MASK, 2, MASK]]), (rows, 1))
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.2]))[None, None], (rows, LENGTH, VOCAB))
    t, s = jnp.full(rows, 0.7), jnp.full(rows, 0.4)
    xs = np.asarray(jax.jit(process.reverse)(keys, logits, xt, t, s))
    assert (xs[:, 0] == 1).all() and (xs[:, 2] == 2).all()
    p = float(process.reveal_probability(t[:1], s[:1])[0])
    for i in (1, 3):
        law = np.bincount(xs[:, i], minlength=4) / rows
        np.testing.assert_allclose(law, [0.5 * p, 0.3 * p, 0.2 * p, 1 - p], atol=4 * 0.5 / np.sqrt(rows))


def test_one_step_gives_the_product_of_marginals(process):
    table = truth().reshape((VOCAB,) * LENGTH)
    marginals = [table.sum(axis=tuple(j for j in range(LENGTH) if j != i)) for i in range(LENGTH)]
    np.testing.assert_allclose(chain.written(process, 1), np.einsum("a,b,c,d->abcd", *marginals).reshape(-1), rtol=1e-4)


@pytest.mark.cases(2)
def test_drawn_steps_follow_their_composition(process):
    """`reverse` itself, three steps of it: far enough from the data that the data would not do."""
    rows = 8_000

    @jax.jit
    def descend(keys):
        x = jnp.full((rows, LENGTH), MASK, jnp.int32)
        for i in (3, 2, 1):
            step = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
            t, s = jnp.full(rows, i / 3), jnp.full(rows, (i - 1) / 3)
            x = process.reverse(step, conditionals(x), x, t, s)
        return x

    x = descend(jax.random.split(jax.random.key(9), rows))
    assert p_value(x, chain.written(process, 3)) > 1e-3
    assert p_value(x) < 1e-3


def test_spread_repeats_each_time_over_its_span():
    assert broadcast_times(jnp.array([[1.0, 2.0]]), 6).tolist() == [[1, 1, 1, 2, 2, 2]]
    with pytest.raises(ValueError, match="do not divide"):
        broadcast_times(jnp.zeros((1, 3)), 4)


def test_texts_enumerate_the_world():
    assert TEXTS.shape == (81, LENGTH) and abs(truth().sum() - 1) < 1e-12
