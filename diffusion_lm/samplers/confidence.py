"""Confidence sampling: each pass commits the surest positions, evenly many a pass."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import Canvas, commit, row_keys
from diffusion_lm.samplers.draw import Draw

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence:
    """Draws a token everywhere and keeps those to which the model gave the highest probability (MaskGIT,
    arXiv 2202.04200, section 3.2; LLaDA's low-confidence remasking, arXiv 2502.09992, section 2.4)."""

    passes: int
    eot: int
    draw: Draw = dataclasses.field(default_factory=Draw)

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")

    def begin(self, canvas: Canvas) -> Canvas:
        return canvas

    def step(self, denoise, state: Canvas) -> Canvas:
        left = self.passes - state.passes
        t = jnp.mean(state.open, axis=1, dtype=jnp.float32)  # the share still masked: exact for the linear schedule
        tokens, probability = self.draw(row_keys(state.keys, state.passes), denoise(state.tokens, t))
        open_count = jnp.sum(state.open, axis=1)
        keep = -(-open_count // jnp.maximum(left, 1))
        surest = _rank(jnp.where(state.open, probability, -1.0)) < keep[:, None]
        return commit(state, surest, tokens, probability, eot=self.eot)

    def done(self, state: Canvas) -> Array:
        return ~jnp.any(state.open, axis=1)


def _rank(values: Array) -> Array:
    """[B, K] -> int32 [B, K]: 0 for a row's largest value; the leftmost of equals first."""
    return jnp.argsort(jnp.argsort(-values, axis=1, stable=True), axis=1)
