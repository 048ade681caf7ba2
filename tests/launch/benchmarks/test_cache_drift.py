"""The divergence of approximate from exact passes that the suite cache_drift reports, on random parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small import module_of

from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from launch.benchmarks.cache_drift import WatchedDenoiser

L, MASK = 8, 11
ALL = jnp.arange(L, dtype=jnp.int32)[None]
T = jnp.full(1, 0.5)
forward_positions = jax.jit(lambda network, *seen: network.forward_positions(*seen))


@pytest.fixture(scope="module")
def denoiser():
    module = module_of(DenoiserSpec(width=16, layers=2, heads=2, mlp_dim=16), MASK)
    params, rng = (
        nn.meta.unbox(jax.jit(functools.partial(init_params, module))(jax.random.key(0))),
        np.random.default_rng(0),
    )
    params = jax.tree.map(lambda a: a + jnp.asarray(rng.normal(scale=0.3, size=a.shape), a.dtype), params)
    return WatchedDenoiser(network=BoundModel(module=module, params=params).for_sampling(), mask=MASK)


def test_the_sum_is_the_divergence_at_masks_from_an_exact_pass(denoiser):
    first = jnp.array([[1, 2, MASK, MASK, MASK, MASK, MASK, MASK]])
    _, watched = forward_positions(denoiser, denoiser.empty_cache(1, L), first, ALL, T)
    assert watched.count == 6 and watched.nats == pytest.approx(0, abs=1e-5)
    at, tokens = jnp.array([[2, 3, 5, L]]), jnp.array([[7, 8, MASK, MASK]])
    logits, after = forward_positions(denoiser, watched, tokens, at, T)
    canvas = jnp.array([[1, 2, 7, 8, MASK, MASK, MASK, MASK]])
    assert (after.canvas == canvas).all() and after.count == 7  # one more mask, at 5; L is outside
    exact = denoiser.network.denoise_canvas(denoiser.network.empty_cache(1, 0), canvas, T)[0, 5]
    log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(logits[0, 2])
    kl = float(jnp.sum(jnp.exp(log_p) * (log_p - log_q)))
    assert kl > 1e-3 and after.nats - watched.nats == pytest.approx(kl, rel=1e-3)
