"""What training carries from step to step: arrays only, no optimizer, no apply function, no key."""

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
    """step int32 []: updates done; ema_params None where no average is kept; all leaves are plain arrays."""

    step: Array
    params: Any
    ema_params: Any
    opt_state: Any


def initial(init: Callable[[Array], Any], optimizer: optax.GradientTransformation, ema: bool, key: Array) -> TrainState:
    """The state before the first step. init(key) -> parameters, boxed with their logical axes or plain.

    The boxes are kept, so that jax.eval_shape of this says where each array lies; unbox what a step is to take.
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
    """Numbers in a tree of arrays, abstract ones too."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
