"""Times of low discrepancy: each uniform, together even, and worth it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.oracle import MASK, TEXTS, Oracle, batch_of

from diffusion_lm.attention_patterns import Full
from diffusion_lm.objectives.base import draw_times
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.schedules import Cosine, Polynomial


def keys(count=2_000):
    return jax.random.split(jax.random.key(0), count)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 4)])
def test_each_entry_is_uniform(shape):
    t = np.asarray(jax.jit(jax.vmap(lambda key: draw_times(key, shape)))(keys()))
    assert t.min() > 0 and t.max() <= 1
    for column in t.reshape(2_000, -1).T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3


def test_together_they_are_stratified():
    t = np.sort(np.asarray(jax.vmap(lambda key: draw_times(key, (3, 4)))(keys())).reshape(2_000, -1), axis=1)
    np.testing.assert_allclose(np.diff(t, axis=1), 1 / 12, atol=1e-6)


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 1000])
def test_steps_are_on_the_grid_and_all_hit_alike(num_timesteps):
    process = Absorbing(schedule=Cosine(), mask=MASK)
    t = draw_times(jax.random.key(4), (7_000, 1), num_timesteps)
    step = np.round(np.asarray(t) * num_timesteps).astype(int)
    np.testing.assert_allclose(t, step / num_timesteps, rtol=1e-6)
    assert step.min() >= 1 and step.max() == num_timesteps
    counts = np.bincount(step[:, 0], minlength=num_timesteps + 1)[1:]
    assert (abs(counts - 7_000 / num_timesteps) <= 1).all()
    assert (process.step_weight(t, t - 1 / num_timesteps)[step == 1] == 1).all()  # the last step reveals everything


def test_the_loss_varies_less_than_with_independent_times():
    process = Absorbing(schedule=Polynomial(power=2.0), mask=MASK)
    batch = batch_of(np.tile(TEXTS[:1], (32, 1)))

    def loss(key, draw):
        t = draw(jax.random.fold_in(key, 0), (32, 1))
        xt = process.corrupt(jax.random.fold_in(key, 1), batch.tokens, t)
        said = Oracle()(xt, t, attention=Full(), positions=batch.positions, segment_ids=batch.segment_ids)
        return process.nelbo(said, batch.tokens, xt, t, jnp.ones(xt.shape), 0)

    def independent(key, shape):
        return 1.0 - jax.random.uniform(key, shape)

    spreads = []
    for draw in (draw_times, independent):
        losses = jax.jit(jax.vmap(lambda key, draw=draw: loss(key, draw)))(keys(1_500))
        spreads.append(float(losses.std()))
    assert spreads[0] < 0.9 * spreads[1], spreads
