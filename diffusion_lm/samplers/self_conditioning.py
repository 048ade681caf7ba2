"""Self-conditioned sampling: each pass is told what the last one said, whatever the canvas's sampler."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import Canvas, Sampler

Array = jax.Array


@struct.dataclass
class Remembered:
    """A sampler's own carry, which can be read through this one, and soft float32 [B, K, E]: the mean vector of what
    the last pass said; zeros before the first."""

    inner: Any
    soft: Array

    def __getattr__(self, name: str) -> Any:
        if name not in CANVAS:
            raise AttributeError(name)
        return getattr(self.inner, name)


CANVAS = frozenset(field.name for field in dataclasses.fields(Canvas))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfConditioned:
    """Clears a canvas as `sampler` would, with the last pass's soft prediction beside it (arXiv 2208.04202, section 3;
    DiffusionGemma).

    What is fed back is softmax(logits) as the network said them, at temperature 1, as in training; DiffusionGemma feeds
    back what it drew from. The prediction is of the pass before, at another time and another x_t: no bound speaks of
    that (see `objectives.self_conditioning`).

    sampler  one that asks the network once a pass, not inside a branch
    width    E
    """

    sampler: Sampler
    width: int

    @property
    def passes(self) -> int:
        """The most passes a canvas."""
        return self.sampler.passes

    def begin(self, canvas: Canvas) -> Remembered:
        return Remembered(inner=self.sampler.begin(canvas), soft=jnp.zeros((*canvas.tokens.shape, self.width)))

    def step(self, denoise, state: Remembered) -> Remembered:
        asked = _Asked(denoise, state.soft)
        inner = self.sampler.step(asked, state.inner)
        (logits,) = asked.said
        return Remembered(inner=inner, soft=denoise.mean_vector(logits))

    def done(self, state: Remembered) -> Array:
        return self.sampler.done(state.inner)


class _Asked:
    """The network with a soft prediction beside the canvas; keeps what it said."""

    def __init__(self, denoise, soft: Array):
        self.denoise, self.soft, self.said = denoise, soft, []

    def __call__(self, tokens: Array, t: Array, **vectors) -> Array:
        self.said.append(self.denoise(tokens, t, soft=self.soft, **vectors))
        return self.said[-1]

    def mean_vector(self, logits: Array) -> Array:
        return self.denoise.mean_vector(logits)
