"""Small networks with every parameter away from zero, and rows to read."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.nn.bound import Bound
from diffusion_lm.nn.denoiser import Architecture, Denoiser, init_params

VOCAB = MASK = 11
ARCHITECTURES = {
    "plain": Architecture(width=16, layers=2, heads=2, mlp=24, qk_norm=False, products="float32"),
    "grouped, untied, timed": Architecture(
        width=16, layers=2, heads=4, kv_heads=2, head_width=6, mlp=24, tied=False, time_conditioning=True,
        products="float32",
    ),
}  # fmt: skip


@functools.cache
def boxed(architecture: Architecture, vocab: int = VOCAB):
    module = Denoiser(architecture, vocab=vocab)
    return jax.jit(functools.partial(init_params, module))(jax.random.key(0))


@functools.cache
def bound(architecture: Architecture, vocab: int = VOCAB) -> Bound:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + rng.normal(scale=0.25, size=a.shape).astype("f4")),
        nn.meta.unbox(boxed(architecture, vocab)),
    )
    return Bound(module=Denoiser(architecture, vocab=vocab), params=params)


def rows(length: int, batch: int = 2, seed: int = 0, vocab: int = VOCAB) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(vocab, size=(batch, length)), jnp.int32)


def read(bound: Bound, tokens, reading, *, t=None, segments=None, positions=None, length=None):
    """Logits (a pair for NoisyClean)."""
    length = length or tokens.shape[1]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (tokens.shape[0], length))
    t = jnp.zeros((tokens.shape[0], 1)) if t is None else t
    return _read(bound, tokens, t, positions, segments, reading)


@functools.partial(jax.jit, static_argnums=5)
def _read(bound, tokens, t, positions, segments, reading):
    said = bound.denoise(tokens, t, reading=reading, positions=positions, segments=segments)
    return tuple(one.logits() for one in said) if isinstance(said, tuple) else said.logits()


@functools.partial(jax.jit, static_argnums=4)
def extend(bound, cache, tokens, count, reading):
    said, cache = bound.extend(cache, tokens, count, reading)
    return said.logits(), cache


read_canvas = jax.jit(lambda bound, cache, canvas, t: bound.read_canvas(cache, canvas, t))
