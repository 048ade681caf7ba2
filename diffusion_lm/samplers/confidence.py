"""Confidence sampling: each step commits the positions that the network is most certain of."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, commit, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import ConfidenceScore, FixedCount, UnmaskingSchedule, entropy

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence(CanvasSampler):
    """Samples a token everywhere and keeps the most certain ones, as many as `schedule` allows (MaskGIT, arXiv
    2202.04200, section 3.2; LLaDA's low-confidence remasking, arXiv 2502.09992, section 2.4).

    denoising_steps  the most steps a canvas: each commits at least one position, and enough to finish in time
    """

    denoising_steps: int
    eos: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    schedule: UnmaskingSchedule = dataclasses.field(default_factory=FixedCount)

    def query(self, state: Canvas) -> Query:
        # the masked share is the exact time under the linear schedule
        return Query(state.tokens, jnp.mean(state.undecided, axis=1, dtype=jnp.float32))

    def update(self, state: Canvas, logits: Array) -> Canvas:
        tokens, confidence = self.sampling(fold_in_rows(state.keys, state.step), logits)
        chosen = self.choose(logits, confidence, state.undecided, self.denoising_steps - state.step)
        return commit(state, chosen, tokens, confidence, eos=self.eos)

    def choose(self, logits: Array, confidence: Array, undecided: Array, steps_left: int | Array) -> Array:
        """bool [B, W]: the positions to commit, of those undecided [B, W], with so many steps left, this one included.
        confidence [B, W] are the probabilities of the sampled tokens under logits [B, W, V]."""
        score = _SCORES[self.schedule.score](self.sampling.allowed(logits), confidence)
        score = jnp.where(undecided, score, -jnp.inf)
        order = jnp.argsort(-score, axis=1, stable=True)  # the leftmost of equals first
        num_undecided = jnp.sum(undecided, axis=1)
        count = self.schedule.count(jnp.take_along_axis(score, order, axis=1), num_undecided, steps_left)
        count = jnp.maximum(count, FixedCount().count(score, num_undecided, steps_left))
        return jnp.argsort(order, axis=1) < count[:, None]


def _margin(logits: Array, confidence: Array) -> Array:
    """The highest probability minus the second highest (arXiv 2502.06768, section 4)."""
    del confidence
    best, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0], -1, 0)
    return best - second


_SCORES: dict[ConfidenceScore, object] = {
    "probability": lambda logits, confidence: confidence,
    "margin": _margin,
    "entropy": lambda logits, confidence: -entropy(logits),
}
