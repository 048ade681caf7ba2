"""The state of training: arrays only."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from diffusion_lm.types import Array


@struct.dataclass
class TrainState:
    """What is trained, and what a checkpoint stores.

    Args:
        step: int32 [], updates done.
        params: what is trained; frozen parameters are constants of the update (`step.LossFn`).
        ema_params: their moving average; None if none is kept.
        opt_state: the optimizer's.
    """

    step: Array
    params: Any
    ema_params: Any
    opt_state: Any


def initial(init: Callable[[Array], Any], optimizer: optax.GradientTransformation, ema: bool, key: Array) -> TrainState:
    """The state before the first step.

    Args:
        init: key -> parameters, boxed with their logical axes (flax.linen.meta) or plain.
        optimizer: its state is initialised from the parameters.
        ema: whether to keep a moving average.
        key: a random key.

    Returns:
        The state, boxed as the parameters are, so that jax.eval_shape of this gives its layout; see `unboxed`.
    """
    params = init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        opt_state=optimizer.init(params),
    )


def unboxed(state: TrainState) -> TrainState:
    """The same arrays without their logical axes."""
    return nn.meta.unbox(state)


def parameter_count(params: Any) -> int:
    """The number of parameters in a tree of arrays, abstract ones too."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
