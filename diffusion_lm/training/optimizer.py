"""AdamW and Muon with a warmup, as optax chains.

Decoupled weight decay: arXiv 1711.05101. Warmup-stable-decay: arXiv 2404.06395. Muon: arXiv 2502.16982.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from diffusion_lm.types import Array


class Optimizer(Protocol):
    """`Config.optim`: a frozen dataclass that makes an optax transformation."""

    def rate(self, steps: int) -> Callable[[Array], Array]:
        """step int32 [] -> the learning rate that is logged, float32 [], in a run of `steps` updates."""

    def build(self, steps: int, boxed: Any) -> optax.GradientTransformation:
        """The transformation for parameters such as `boxed` (abstract, with their logical axes)."""


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warmup, then half a cosine down to the last update.

    Args:
        warmup: updates until the peak.
        final: the last update's share of the peak, 0 to 1.
    """

    warmup: int = 100
    final: float = 0.1

    def __post_init__(self):
        _check_shape(self)

    def __call__(self, step: Array, steps: int) -> Array:
        """The multiple of the peak, float32 [], at update `step` (from 0) of `steps`."""
        done = jnp.clip((step - self.warmup) / max(steps - 1 - self.warmup, 1), 0.0, 1.0)
        falling = self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(step < self.warmup, (step + 1) / (self.warmup + 1), falling)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warmup, a constant rate, then a linear decay (arXiv 2404.06395).

    Args:
        warmup: updates until the peak.
        decay: updates of the decay, the last ones; 0 for none.
        final: the last update's share of the peak, 0 to 1.
    """

    warmup: int = 100
    decay: int = 100
    final: float = 0.0

    def __post_init__(self):
        _check_shape(self)
        if self.decay < 0:
            raise ValueError(f"schedule.decay must not be negative; got {self.decay}")

    def __call__(self, step: Array, steps: int) -> Array:
        """The multiple of the peak, float32 [], at update `step` (from 0) of `steps`."""
        left = jnp.clip((steps - 1 - step) / self.decay, 0.0, 1.0) if self.decay else 1.0
        falling = self.final + (1 - self.final) * left
        return jnp.where(step < self.warmup, (step + 1) / (self.warmup + 1), falling)


def _check_shape(schedule) -> None:
    if schedule.warmup < 0:
        raise ValueError(f"schedule.warmup must not be negative; got {schedule.warmup}")
    if not 0 <= schedule.final <= 1:
        raise ValueError(f"schedule.final is a fraction of the peak, 0 to 1; got {schedule.final}")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101).

    Args:
        lr: the peak learning rate.
        schedule: its course over the updates.
        b1, b2: decay of the first and second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, per update and unit of learning rate; norms and other vectors are spared.
        grad_clip_norm: the largest global gradient norm; larger gradients are scaled down to it. 0 for no limit.
    """

    lr: float = 1e-3
    schedule: WarmupCosine | WarmupStableDecay = WarmupCosine()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip_norm: float = 1.0

    def __post_init__(self):
        if not (0 < self.lr < float("inf") and 0 < self.eps < float("inf")):
            raise ValueError(f"optim.lr and optim.eps must be positive; got {self.lr} and {self.eps}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"optim.b1 and optim.b2 lie in [0, 1); got {self.b1} and {self.b2}")
        if not (0 <= self.weight_decay < float("inf") and 0 <= self.grad_clip_norm < float("inf")):
            raise ValueError(f"optim.weight_decay and optim.grad_clip_norm can't be negative; got {self}")

    def rate(self, steps: int) -> Callable[[Array], Array]:
        """step int32 [] -> the learning rate, float32 []."""
        return lambda step: jnp.float32(self.lr) * self.schedule(step, steps)

    def build(self, steps: int, boxed: Any) -> optax.GradientTransformation:
        """The chain over `steps` updates of parameters such as `boxed` (abstract, with their logical axes)."""
        return optax.chain(
            optax.clip_by_global_norm(self.grad_clip_norm) if self.grad_clip_norm else optax.identity(),
            self.direction(boxed),
            optax.add_decayed_weights(self.weight_decay, mask=decayed(boxed)),
            optax.scale_by_learning_rate(self.rate(steps)),
        )

    def direction(self, boxed: Any) -> optax.GradientTransformation:
        """Gradients to updates of about one unit, before decay and learning rate."""
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon for the matrices of layers, AdamW for all else: embeddings, heads, norms, biases, conditioning, adapters.

    A matrix's momentum is orthogonalised by Newton-Schulz iterations (kellerjordan.github.io/posts/muon), then scaled
    by 0.2 sqrt(max(inputs, outputs)), the size of AdamW's updates (arXiv 2502.16982, section 2.2), so that one learning
    rate serves both. Heads of attention together are one matrix; layers, experts, keys and values, and the two halves
    of a gated feed-forward are matrices of their own. Besides the gradient an update costs 15 products of matrices of
    the parameters' sizes: about as much as reading 5 x width tokens.

    Args:
        lr, schedule, b1, b2, eps, weight_decay, grad_clip_norm: as `AdamW`'s; b1, b2 and eps aren't for matrices.
        momentum: decay of the matrices' momentum (Nesterov's), in [0, 1).
    """

    momentum: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum lies in [0, 1); got {self.momentum}")

    def direction(self, boxed: Any) -> optax.GradientTransformation:
        """Gradients to updates of about one unit, before decay and learning rate."""
        axes = jax.tree.map(_matrix_axes, boxed, is_leaf=_is_boxed)
        labels = jax.tree.map(lambda a: "adam" if a == optax.MaskedNode() else "muon", axes, is_leaf=_is_axes)
        orthogonal = scale_by_muon(beta=self.momentum, weight_dimension_numbers=axes)
        sized = optax.stateless(lambda updates, _: jax.tree.map(_as_large_as_adams, updates, axes))
        return optax.partition({"muon": optax.chain(orthogonal, sized), "adam": super().direction(boxed)}, labels)


def _matrix_axes(param: Any) -> MuonDimensionNumbers | optax.MaskedNode:
    """The inputs and outputs of a layer's matrix: the axis of the width, and those of heads or hidden units. Other axes
    count matrices. MaskedNode for what is no such matrix."""
    names = getattr(param, "names", ())
    others = tuple(i for i, name in enumerate(names) if name in ("heads", "kv_heads", "head_dim", "mlp"))
    if "embed" not in names or not others:
        return optax.MaskedNode()
    return MuonDimensionNumbers((names.index("embed"),), others)


def _as_large_as_adams(update: Array, axes: MuonDimensionNumbers) -> Array:
    sides = [math.prod(update.shape[i] for i in side) for side in axes]
    return 0.2 * math.sqrt(max(sides)) * update


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, MuonDimensionNumbers | optax.MaskedNode)


def decayed(boxed: Any) -> Any:
    """Which parameters decay, a bool each: those with at least two axes, not counting the one that stacks layers."""

    def is_matrix(param) -> bool:
        value = nn.meta.unbox(param)
        names = getattr(param, "names", (None,) * len(value.shape))
        return len([name for name in names if name != "layers"]) >= 2

    return jax.tree.map(is_matrix, boxed, is_leaf=_is_boxed)
