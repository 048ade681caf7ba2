"""One exact categorical draw from logits, cheap at large vocabularies."""

import jax
import jax.numpy as jnp

Array = jax.Array
_BLOCK = 128


def categorical(key: Array, logits: Array) -> Array:
    """Draws from softmax(logits [..., V]) by inverting the distribution function; int32 [...].

    Two uniforms a draw choose a block of 128 entries, then an entry in it, so that sums stay short: the total
    variation from the exact distribution is below 1e-7 x V / 128 in float32. The Gumbel trick needs V uniforms a
    draw, and in float32 it silently cuts off events rarer than about 1e-7. An entry at -inf is never drawn.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    weights = jnp.exp(logits.astype(jnp.float32) - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0)] * len(shape) + [(0, -vocab % _BLOCK)])
    weights = weights.reshape(*shape, -1, _BLOCK)
    first, second = jax.random.uniform(key, (2, *shape))
    block = _invert(first, weights.sum(axis=-1))
    inside = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    return block * _BLOCK + _invert(second, inside)


def _invert(u: Array, weights: Array) -> Array:
    """The index at which the running sum of `weights` passes u x their total; int32."""
    running = jnp.cumsum(weights, axis=-1)
    total = running[..., -1:]
    target = jnp.minimum(u[..., None] * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.sum(running <= target, axis=-1, dtype=jnp.int32)
