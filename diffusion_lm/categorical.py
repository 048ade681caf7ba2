"""One exact categorical draw from logits, cheap at large vocabularies."""

import jax
import jax.numpy as jnp

Array = jax.Array
_BLOCK = 128
INVALID = -(2**31)  # drawn where no logit is finite: no token and no "none" has this id


def categorical(key: Array, logits: Array) -> Array:
    """Draws from softmax(logits [..., V]) by inverting the distribution function; int32 [...].

    Two uniforms a draw choose a block of 128 entries, then an entry in it, so that sums stay short. A uniform has 23
    bits: a block's probability is off by about 1e-7, an entry's by about 1e-7 of its block's; in total variation
    below 1e-7 x (V / 128 + 128). The Gumbel trick needs V uniforms a draw, and in float32 it cuts off whatever is
    rarer than about 1e-7. An entry that isn't finite (-inf, or a nan that some arithmetic left) is never drawn; where
    none is finite, the draw is `INVALID`.
    """
    return from_uniforms(jax.random.uniform(key, (2, *logits.shape[:-1])), logits)


def from_probabilities(key: Array, p: Array) -> Array:
    """Draws from p [..., V] up to a factor; what rounding made negative counts as 0."""
    return categorical(key, jnp.log(jnp.maximum(p, 0.0)))


def from_uniforms(uniforms: Array, logits: Array) -> Array:
    """The draw that `categorical` makes of its two uniforms: float32 [2, ...] and logits [..., V] -> int32 [...]."""
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    logits = _finite(logits)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits.astype(jnp.float32) - highest)
    weights = jnp.pad(weights, [(0, 0)] * len(shape) + [(0, -vocab % _BLOCK)])
    weights = weights.reshape(*shape, -1, _BLOCK)
    first, second = uniforms
    block = _invert(first, weights.sum(axis=-1))
    inside = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    return jnp.where(jnp.isneginf(highest[..., 0]), INVALID, block * _BLOCK + _invert(second, inside))


def coupled(key: Array, logits: Array) -> Array:
    """Draws from softmax(logits [V]), int32 [], so that one key mostly draws the same from distributions that overlap.

    By the Gumbel trick draws agree with probability (1 - d) / (1 + d) or more at a total variation distance of d, where
    no rule reaches more than 1 - d (arXiv 2408.07978). Here in two steps, a block of 128 entries and an entry in it,
    which takes V / 128 + 128 uniforms in place of V. `categorical` takes two, but agrees less: where running sums of
    probabilities lie alike. Float32 noise cuts off what is rarer than about 1e-7 in its step. `INVALID` where no logit
    is finite.
    """
    logits = _finite(logits)
    blocks = jnp.pad(logits, (0, -logits.shape[-1] % _BLOCK), constant_values=-jnp.inf).reshape(-1, _BLOCK)
    sums = jax.nn.logsumexp(blocks, axis=-1)
    block = jnp.argmax(sums + jax.random.gumbel(key, sums.shape)).astype(jnp.int32)
    noise = jax.random.gumbel(jax.random.fold_in(key, block), (_BLOCK,))
    entry = jnp.argmax(blocks[block] + noise).astype(jnp.int32)
    return jnp.where(jnp.all(jnp.isneginf(sums)), INVALID, block * _BLOCK + entry)


def likeliest(logits: Array) -> Array:
    """The index of the highest finite logit [..., V], the first of equals; int32 [...]. `INVALID` where there is none.
    (argmax alone returns the index of a nan.)"""
    logits = _finite(logits)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.all(jnp.isneginf(logits), axis=-1), INVALID, best)


def _finite(logits: Array) -> Array:
    return jnp.where(jnp.isfinite(logits), logits, -jnp.inf)


def _invert(u: Array, weights: Array) -> Array:
    """The index at which the running sum of `weights` passes u x their total; int32."""
    # Sums rounded in another order may creep up over entries of no weight: those are never passed.
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    total = jnp.max(running, axis=-1, keepdims=True)
    target = jnp.minimum(u[..., None] * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(running > target, axis=-1).astype(jnp.int32)
