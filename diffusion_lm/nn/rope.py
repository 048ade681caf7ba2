"""Rotary position embedding, and its scalings for longer texts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.nn.specs import RopeScaling, RopeSpec
from diffusion_lm.sharding import platform

Array = jax.Array


class Rotation(NamedTuple):
    """What positions do to queries and keys.

    cos, sin: float32 [B, L, turned columns / 2], of the angles by which pairs of a head's columns are turned, times
        YaRN's magnitude.
    query_scale: float32 [B, L], what queries are multiplied by; None for nothing.
    """

    cos: Array
    sin: Array
    query_scale: Array | None


def rotation_of(spec: RopeSpec, positions: Array, head_dim: int) -> Rotation:
    """How heads at these positions are turned.

    Args:
        positions: int32 [B, L].
        head_dim: a head's width, of which `spec.fraction` is turned.
    """
    turned = int(head_dim * spec.fraction) // 2
    pairs = head_dim // 2 if spec.proportional else turned
    if spec.scaling is None:
        rates = spec.theta ** -jnp.linspace(0.0, 1.0, pairs, endpoint=False)
    else:
        rates = jnp.asarray(_scaled(spec.scaling, spec.theta, pairs), jnp.float32)
    rates = jnp.where(jnp.arange(pairs) < turned, rates, 0.0) if spec.proportional else rates
    angles = positions[..., None].astype(jnp.float32) * rates[None, None]
    cos, sin = _waves(angles)
    if spec.scaling is not None and spec.scaling.kind == "yarn":
        magnitude = spec.scaling.magnitude or 0.1 * math.log(spec.scaling.factor) + 1.0
        cos, sin = magnitude * cos, magnitude * sin
    if spec.scaling is None or not spec.scaling.query_growth:
        return Rotation(cos, sin, None)
    texts = (positions // spec.scaling.original_length).astype(jnp.float32)
    return Rotation(cos, sin, 1.0 + spec.scaling.query_growth * jnp.log1p(texts))


def rotate(x: Array, rotation: Rotation) -> Array:
    """x [B, H, L, D] with the first half of its turned columns paired with the second half."""
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    first, second = jnp.split(turned, 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(parts + [rest] * (rest.shape[-1] > 0), axis=-1)


def _waves(angles: Array) -> tuple[Array, Array]:
    """Cosines and sines. A CPU computes them in a loop, whose results XLA keeps: it would compute them anew in every
    layer for each head's queries and keys, a tenth of a small network's update."""
    if platform() != "cpu":
        return jnp.cos(angles), jnp.sin(angles)
    return tuple(jax.lax.map(lambda i: jnp.where(i == 0, jnp.cos(angles), jnp.sin(angles)), jnp.arange(2)))


def _scaled(scaling: RopeScaling, theta: float, pairs: int) -> np.ndarray:
    """Rates in radians a position, float64 [pairs]."""
    index = np.arange(pairs)
    rates = theta ** -(index / pairs)
    turns = scaling.original_length * rates / (2 * np.pi)  # over the texts of pretraining
    if scaling.kind == "linear":
        kept = np.zeros(pairs)
    elif scaling.kind == "llama3":
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    else:
        # The pair that makes so many turns, by solving for its index; a linear ramp between two of them.
        ends = [pairs * math.log(scaling.original_length / (b * 2 * math.pi)) / math.log(theta)
                for b in (scaling.high, scaling.low)]  # fmt: skip
        first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), 2 * pairs - 1)
        kept = 1.0 - np.clip((index - first) / max(last - first, 0.001), 0.0, 1.0)
    return kept * rates + (1.0 - kept) * rates / scaling.factor
