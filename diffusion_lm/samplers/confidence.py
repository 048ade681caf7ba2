"""Confidence sampling: each pass commits the positions that the network is surest of."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import Canvas, commit, row_keys
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.samplers.pace import Even, Measure, Pace

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence:
    """Draws a token everywhere and keeps the surest, as many as `pace` says (MaskGIT, arXiv 2202.04200, section 3.2;
    LLaDA's low-confidence remasking, arXiv 2502.09992, section 2.4).

    passes  the most passes a canvas: each commits at least one position, and enough to be done in time
    """

    passes: int
    eot: int
    draw: Draw = dataclasses.field(default_factory=Draw)
    pace: Pace = dataclasses.field(default_factory=Even)

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")

    def begin(self, canvas: Canvas) -> Canvas:
        return canvas

    def step(self, denoise, state: Canvas) -> Canvas:
        left = self.passes - state.passes
        t = jnp.mean(state.open, axis=1, dtype=jnp.float32)  # the share still masked: exact for the linear schedule
        logits = denoise(state.tokens, t)
        tokens, probability = self.draw(row_keys(state.keys, state.passes), logits)
        sure = jnp.where(state.open, self._sure(self.draw.allowed(logits), probability), -jnp.inf)
        order = jnp.argsort(-sure, axis=1, stable=True)  # the leftmost of equals first
        open_count = jnp.sum(state.open, axis=1)
        count = self.pace.count(jnp.take_along_axis(sure, order, axis=1), open_count, left)
        keep = jnp.maximum(count, Even().count(sure, open_count, left))
        rank = jnp.argsort(order, axis=1)
        return commit(state, rank < keep[:, None], tokens, probability, eot=self.eot)

    def done(self, state: Canvas) -> Array:
        return ~jnp.any(state.open, axis=1)

    def _sure(self, logits: Array, probability: Array) -> Array:
        return _MEASURES[self.pace.measure](logits, probability)


def _margin(logits: Array, probability: Array) -> Array:
    """The likeliest token's probability less the second's (arXiv 2502.06768, section 4)."""
    del probability
    best, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0], -1, 0)
    return best - second


def _minus_entropy(logits: Array, probability: Array) -> Array:
    del probability
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)


_MEASURES: dict[Measure, object] = {
    "probability": lambda logits, probability: probability,
    "margin": _margin,
    "entropy": _minus_entropy,
}
