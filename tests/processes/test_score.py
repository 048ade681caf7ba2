"""Score entropy, beyond what `test_chain` asks of every process: networks whose scores are no noise's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chain
from support.oracle import LENGTH, MASK, VOCAB, entropy

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.score import AbsorbingScore, UniformScore, UnnormalizedScore
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.schedules import Cosine, Linear
from diffusion_lm.types import DenseLogits

BOTH = pytest.mark.parametrize("kind", [AbsorbingScore, UniformScore])


@pytest.mark.cases(2)
@BOTH
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_scores_of_no_noise_cost_more(kind, schedule):
    """All of e^l too large or too small, their proportions true."""
    process = kind(schedule=schedule, mask=MASK)
    for by in (0.5, -0.5):
        assert chain.bound(process, 0, lambda p, t, by=by: chain.true_denoiser(p, t) + by) > entropy() + 3e-3


@pytest.mark.parametrize(("kind", "pure"), [(AbsorbingScore, Absorbing), (UniformScore, Uniform)])
def test_scores_of_an_x0_prediction_cost_what_it_costs(kind, pure):
    """Noise by noise: with a sum of 1, score entropy and the Kullback-Leibler divergence are one bound.

    Uniform is also told what the position itself says: q(z | v) of each v.
    """
    rng = np.random.default_rng(0)
    x0, xt = (jnp.asarray(rng.integers(VOCAB + more, size=(6, LENGTH))) for more in (0, kind is AbsorbingScore))
    t, weights = jnp.asarray(rng.uniform(0.01, 0.99, (6, 1)), jnp.float32), jnp.asarray(rng.uniform(size=(6, LENGTH)))
    said = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(6, LENGTH, VOCAB)), jnp.float32))
    own = jnp.log1p(VOCAB * (1 - t) / t)[..., None] if kind is UniformScore else 0.0
    by_all = said + own * jax.nn.one_hot(xt, VOCAB)
    costs = [
        process.nelbo(DenseLogits(values=values), x0, xt, t, weights, 0)
        for process, values in ((kind(mask=MASK), said + np.log(VOCAB)), (pure(mask=MASK), by_all))
    ]
    np.testing.assert_allclose(*costs, rtol=1e-5)


@BOTH
def test_the_way_back_is_the_analytic_step(kind):
    """SEDD's own formula in matrices, for scores that a noise can have: exp(-(sigma_t - sigma_s) Q) on the scores,
    times the chance of z from each piece."""
    process, t, s = kind(mask=MASK), 0.6, 0.25
    alphas = [1 - t, 1 - s]
    target = np.eye(VOCAB + 1)[MASK] if kind is AbsorbingScore else np.append(np.full(VOCAB, 1 / VOCAB), 0)
    kept = alphas[0] / alphas[1]
    transition = kept * np.eye(VOCAB + 1) + (1 - kept) * target  # [from, to]
    p = np.append(np.random.default_rng(1).dirichlet(np.ones(VOCAB)), 0)
    marginal = alphas[0] * p + (1 - alphas[0]) * target
    for z in [MASK] if kind is AbsorbingScore else range(VOCAB):
        scores = marginal / marginal[z]
        analytic = (np.linalg.inv(transition.T) @ scores) * transition[:, z]
        at = np.flatnonzero((z == chain.CANVASES).all(axis=1))[0]
        logits = jnp.broadcast_to(jnp.log(jnp.asarray(p[:VOCAB], jnp.float32)), (len(chain.CANVASES), LENGTH, VOCAB))
        ours = chain.posterior(process, logits, t, s)[at, 0]
        np.testing.assert_allclose(ours / ours.sum(), analytic, atol=1e-6)


@pytest.mark.parametrize("total", [0.4, 1.0, 3.0])
def test_unnormalized_scores_step_by_sedds_formula(total):
    """In matrices, for scores of any sum; what is negative counts as 0. The step to 0 leaves no mask."""
    process, t, s = UnnormalizedScore(mask=MASK), 0.6, 0.25
    p = total * np.random.default_rng(1).dirichlet(np.ones(VOCAB))
    kept = (1 - t) / (1 - s)
    transition = kept * np.eye(VOCAB + 1) + (1 - kept) * np.eye(VOCAB + 1)[MASK]  # [from, to]
    scores = np.append((1 - t) / t * p, 1.0)
    analytic = np.maximum((np.linalg.inv(transition.T) @ scores) * transition[:, MASK], 0)
    logits = jnp.asarray(np.log(p * VOCAB), jnp.float32)[None, None]
    times = [jnp.full(1, time, jnp.float32) for time in (t, s, 0.0)]
    ours = np.exp(process.log_probabilities(logits, *times[:2])[0, 0])
    np.testing.assert_allclose(ours, analytic, atol=1e-6)
    last = np.exp(process.log_probabilities(logits, times[0], times[2])[0, 0])
    np.testing.assert_allclose(last / last.sum(), np.append(p / p.sum(), 0), atol=1e-6)
    rows = 20_000
    keys, xt = jax.random.split(jax.random.key(0), rows), jnp.tile(jnp.asarray([[MASK, 1]]), (rows, 1))
    drawn = process.reverse(
        keys, jnp.broadcast_to(logits, (rows, 2, VOCAB)), xt, *(jnp.tile(a, rows) for a in times[:2])
    )
    shares = np.bincount(np.asarray(drawn[:, 0]), minlength=VOCAB + 1) / rows
    assert np.abs(shares - analytic / analytic.sum()).max() < 0.015 and (drawn[:, 1] == 1).all()


@BOTH
@pytest.mark.parametrize("t", [1e-7, 1e-3, 0.5, 0.999, 1.0])
def test_float32_holds_at_both_ends(kind, t):
    """Cost and gradient at times that training may draw, with pieces that a readout pads with minus infinity."""
    process, length = kind(mask=MASK), 6
    x0 = jnp.arange(length, dtype=jnp.int32)[None] % VOCAB
    xt = x0.at[0, :3].set(MASK if kind is AbsorbingScore else 2)
    logits = jax.random.normal(jax.random.key(0), (1, length, VOCAB))
    costs = {}
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):

            def cost(logits, dtype=dtype):
                padded = jnp.pad(logits, ((0, 0), (0, 0), (0, 2)), constant_values=-jnp.inf)
                time, weights = jnp.full((1, 1), t, dtype), jnp.ones((1, length), dtype)
                return process.nelbo(DenseLogits(values=padded), x0, xt, time, weights, 0)

            costs[dtype] = jax.value_and_grad(cost)(jnp.asarray(np.asarray(logits), dtype))
    one, two = costs.values()
    for ours, exact in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        scale = np.abs(exact).max()
        np.testing.assert_allclose(ours, exact, rtol=1e-3, atol=1e-5 * max(scale, 1))


@BOTH
def test_a_bound_in_steps_is_refused(kind):
    cost = functools.partial(kind(mask=MASK).nelbo, DenseLogits(values=jnp.zeros((1, LENGTH, VOCAB))))
    with pytest.raises(ValueError, match=r"continuous time only: set objective\.num_timesteps=0, not 16"):
        cost(
            jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, 1)), jnp.ones((1, 4)), 16
        )
