"""Confidence sampling: each pass commits the positions that the network is surest of."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import Canvas, commit, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import ConfidenceScore, FixedCount, UnmaskingSchedule

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence:
    """Draws a token everywhere and keeps the surest, as many as `pace` says (MaskGIT, arXiv 2202.04200, section 3.2;
    LLaDA's low-confidence remasking, arXiv 2502.09992, section 2.4).

    passes  the most passes a canvas: each commits at least one position, and enough to be done in time
    """

    passes: int
    eos: int
    draw: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    pace: UnmaskingSchedule = dataclasses.field(default_factory=FixedCount)

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")

    def begin(self, canvas: Canvas) -> Canvas:
        return canvas

    def step(self, denoise, state: Canvas) -> Canvas:
        left = self.passes - state.passes
        t = jnp.mean(
            state.undecided, axis=1, dtype=jnp.float32
        )  # the share still masked: exact for the linear schedule
        logits = denoise(state.tokens, t)
        tokens, confidence = self.draw(fold_in_rows(state.keys, state.passes), logits)
        sure = jnp.where(state.undecided, self._sure(self.draw.allowed(logits), confidence), -jnp.inf)
        order = jnp.argsort(-sure, axis=1, stable=True)  # the leftmost of equals first
        num_undecided = jnp.sum(state.undecided, axis=1)
        count = self.pace.count(jnp.take_along_axis(sure, order, axis=1), num_undecided, left)
        keep = jnp.maximum(count, FixedCount().count(sure, num_undecided, left))
        rank = jnp.argsort(order, axis=1)
        return commit(state, rank < keep[:, None], tokens, confidence, eos=self.eos)

    def done(self, state: Canvas) -> Array:
        return ~jnp.any(state.undecided, axis=1)

    def _sure(self, logits: Array, confidence: Array) -> Array:
        return _MEASURES[self.pace.measure](logits, confidence)


def _margin(logits: Array, confidence: Array) -> Array:
    """The likeliest token's probability less the second's (arXiv 2502.06768, section 4)."""
    del confidence
    best, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0], -1, 0)
    return best - second


def _minus_entropy(logits: Array, confidence: Array) -> Array:
    del confidence
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)


_MEASURES: dict[ConfidenceScore, object] = {
    "probability": lambda logits, confidence: confidence,
    "margin": _margin,
    "entropy": _minus_entropy,
}
