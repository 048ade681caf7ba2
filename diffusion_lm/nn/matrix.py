"""The one way to make a weight matrix."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> Array:
    """A float32 parameter drawn from N(0, 1 / fan_in), or zeros for fan_in 0, with named axes."""
    init = nn.initializers.normal(1 / math.sqrt(fan_in)) if fan_in else nn.initializers.zeros
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
