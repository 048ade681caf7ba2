"""Self-conditioned sampling: each pass is told what the last one said, whatever the canvas's sampler."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import Canvas, CanvasSampler

Array = jax.Array


@struct.dataclass
class SelfConditionedState:
    """A sampler's own carry, which can be read through this one, and soft float32 [B, K, E]: the mean vector of what
    the last pass said; zeros before the first."""

    inner: Any
    self_cond: Array

    def __getattr__(self, name: str) -> Any:
        if name not in CANVAS:
            raise AttributeError(name)
        return getattr(self.inner, name)


CANVAS = frozenset(field.name for field in dataclasses.fields(Canvas))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfConditionedSampler:
    """Clears a canvas as `sampler` would, with the last pass's soft prediction beside it (arXiv 2208.04202, section 3;
    DiffusionGemma).

    What is fed back is softmax(logits) as the network said them, at temperature 1, as in training; DiffusionGemma feeds
    back what it drew from. The prediction is of the pass before, at another time and another x_t: no bound speaks of
    that (see `objectives.self_conditioning`).

    sampler  one that asks the network once a pass, not inside a branch
    width    E
    """

    sampler: CanvasSampler
    width: int

    @property
    def passes(self) -> int:
        """The most passes a canvas."""
        return self.sampler.passes

    def begin(self, canvas: Canvas) -> SelfConditionedState:
        return SelfConditionedState(
            inner=self.sampler.begin(canvas), self_cond=jnp.zeros((*canvas.tokens.shape, self.width))
        )

    def step(self, denoise, state: SelfConditionedState) -> SelfConditionedState:
        asked = _Asked(denoise, state.self_cond)
        inner = self.sampler.step(asked, state.inner)
        (logits,) = asked.said
        return SelfConditionedState(inner=inner, self_cond=denoise.expected_embedding(logits))

    def done(self, state: SelfConditionedState) -> Array:
        return self.sampler.done(state.inner)


class _Asked:
    """The network with a soft prediction beside the canvas; keeps what it said."""

    def __init__(self, denoise, self_cond: Array):
        self.denoise, self.self_cond, self.said = denoise, self_cond, []

    def __call__(self, tokens: Array, t: Array, **vectors) -> Array:
        self.said.append(self.denoise(tokens, t, self_cond=self.self_cond, **vectors))
        return self.said[-1]

    def expected_embedding(self, logits: Array) -> Array:
        return self.denoise.expected_embedding(logits)
