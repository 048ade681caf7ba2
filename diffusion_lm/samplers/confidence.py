"""Confidence sampling: each step commits the positions that the network is most certain of."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, commit, fold_in_rows, gather_tokens
from diffusion_lm.samplers.canvas_blocks import block_steps_left, first_free, in_block
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import ConfidenceScore, EvenlyLeft, FixedCount, UnmaskingSchedule, entropy

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence(CanvasSampler):
    """Samples a token everywhere and keeps the most certain ones, as many as `schedule` allows (MaskGIT, arXiv
    2202.04200, section 3.2; LLaDA's low-confidence remasking, arXiv 2502.09992, section 2.4).

    denoising_steps  the most steps a canvas, in which `schedule` commits all of it
    block_length     only the first unfinished block of so many positions is committed from, left to right; each has
                     its share of the steps (LLaDA's semi-autoregressive sampling). 0: the canvas is one block
    block_origin     where blocks are counted from: the canvas's first position, or its first that isn't fixed
    first_alone      the canvas's first position is committed in a step of its own, the first: a head that predicts the
                     next token knows it from the text before the canvas alone (Fast-dLLM v2, arXiv 2509.26328)
    filtered_score   certainty is measured after temperature, top-k and top-p, as most families' public code does;
                     else on the network's own distribution
    counted_times    the network's time is the step's number over so many, counted upward and at most 1
                     (tiny-diffusion). 0: the masked share
    """

    denoising_steps: int
    eos: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    schedule: UnmaskingSchedule = dataclasses.field(default_factory=FixedCount)
    block_length: int = 0
    block_origin: Literal["canvas", "prompt"] = "prompt"
    first_alone: bool = False
    filtered_score: bool = False
    counted_times: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.block_length < 0:
            raise ValueError(f"block_length must be at least 1 (or 0: one block); got {self.block_length}")
        if self.block_length and getattr(self.schedule, "least", _EVENLY) != _EVENLY:
            raise ValueError(f"block_length goes with a schedule of least={_EVENLY}; got {self.schedule.least}")

    def query(self, state: Canvas) -> Query:
        if self.counted_times:
            time = jnp.minimum(state.step + 1, self.counted_times) / self.counted_times
            return Query(state.tokens, jnp.full(state.tokens.shape[0], time, jnp.float32))
        # the masked share is the exact time under the linear schedule
        return Query(state.tokens, jnp.mean(state.undecided, axis=1, dtype=jnp.float32))

    def update(self, state: Canvas, logits: Array) -> Canvas:
        tokens, confidence = self.sampling(fold_in_rows(state.keys, state.step), logits)
        here, steps_left = state.undecided, self.denoising_steps - state.step
        if self.block_length and self.block_length < here.shape[1]:
            origin = 0 if self.block_origin == "canvas" else first_free(state.fixed)
            steps_left = block_steps_left(state, self.denoising_steps, self.block_length, origin)
            here &= in_block(here, self.block_length, origin)
        if self.first_alone:
            alone = (state.step == 0) & state.undecided[:, :1]
            here &= ~alone | (jnp.arange(here.shape[1], dtype=jnp.int32)[None] == 0)
        return commit(
            state, self.choose(logits, tokens, confidence, here, steps_left), tokens, confidence, eos=self.eos
        )

    def choose(
        self, logits: Array, tokens: Array, confidence: Array, undecided: Array, steps_left: int | Array
    ) -> Array:
        """bool [B, W]: the positions to commit, of those undecided [B, W], with so many steps left, this one included.
        confidence [B, W] are the probabilities of the sampled tokens [B, W] under logits [B, W, V]."""
        if self.filtered_score:
            logits = self.sampling.filtered(logits)
            confidence = jnp.exp(gather_tokens(jax.nn.log_softmax(logits, axis=-1), tokens))
        score = _SCORES[self.schedule.score](self.sampling.allowed(logits), confidence)
        score = jnp.where(undecided, score, -jnp.inf)
        order = jnp.argsort(-score, axis=1, stable=True)  # the leftmost of equals first
        num_undecided = jnp.sum(undecided, axis=1, dtype=jnp.int32)
        count = self.schedule.count(jnp.take_along_axis(score, order, axis=1), num_undecided, steps_left)
        least = getattr(self.schedule, "least", _EVENLY)
        count = jnp.maximum(count, least(num_undecided, undecided.shape[1], steps_left, self.denoising_steps))
        return undecided & (jnp.argsort(order, axis=1) < count[:, None])


def _margin(logits: Array, confidence: Array) -> Array:
    """The highest probability minus the second highest (arXiv 2502.06768, section 4)."""
    del confidence
    best, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0], -1, 0)
    return best - second


_EVENLY = EvenlyLeft()
_SCORES: dict[ConfidenceScore, object] = {
    "probability": lambda logits, confidence: confidence,
    "margin": _margin,
    "entropy": lambda logits, confidence: -entropy(logits),
    "position": lambda logits, confidence: -jnp.broadcast_to(jnp.arange(confidence.shape[1]), confidence.shape) * 1.0,
}
