"""Editing: while a canvas is unmasked, and after it, tokens that stand are replaced where another is certain enough."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, fields_of, fold_in_rows, gather_tokens
from diffusion_lm.samplers.confidence import Confidence

Array = jax.Array


@struct.dataclass
class EditingState(Canvas):
    """A canvas; settled bool [B], rows whose text stands; editing_steps int32 [B], steps since the last mask went."""

    settled: Array
    editing_steps: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Editing(CanvasSampler):
    """Unmasks with `sampler`; each step also replaces tokens of earlier steps by what is sampled in their place, if it
    differs and its probability is above `threshold` (LLaDA2.1, token-to-token editing, as its public code has it).

    A row is done after a step that began without masks and replaced nothing, or after `max_editing_steps` steps without
    masks. Fixed tokens stay.
    """

    sampler: Confidence
    threshold: float = 0.5
    max_editing_steps: int = 16

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"an editing threshold is a probability, in [0, 1]; got {self.threshold}")
        if self.max_editing_steps < 0:
            raise ValueError(f"max_editing_steps must be at least 0; got {self.max_editing_steps}")

    @property
    def denoising_steps(self) -> int:
        """The most steps a canvas."""
        return self.sampler.denoising_steps + self.max_editing_steps

    def init(self, canvas: Canvas) -> EditingState:
        canvas = self.sampler.init(canvas)
        settled = ~jnp.any(canvas.undecided, axis=1)
        return EditingState(**fields_of(canvas), settled=settled, editing_steps=jnp.zeros_like(settled, jnp.int32))

    def query(self, state: EditingState) -> Query:
        return self.sampler.query(state)

    def update(self, state: EditingState, logits: Array) -> EditingState:
        sampling = self.sampler.sampling
        after = self.sampler.update(state, logits)
        tokens, _ = sampling(fold_in_rows(state.keys, state.step), logits)  # what the sampler drew
        scored = sampling.filtered(logits) if self.sampler.filtered_score else sampling.allowed(logits)
        confidence = jnp.exp(gather_tokens(jax.nn.log_softmax(scored, axis=-1), tokens))
        standing = ~state.undecided & ~state.fixed & ~state.settled[:, None]
        edited = standing & (tokens != state.tokens) & (confidence > self.threshold)
        full = ~jnp.any(state.undecided, axis=1)
        steps = state.editing_steps + full
        no_more = (full & ~jnp.any(edited, axis=1)) | (steps >= self.max_editing_steps)
        return after.replace(
            tokens=jnp.where(edited, tokens, after.tokens),
            confidence=jnp.where(edited, confidence, after.confidence),
            settled=state.settled | (no_more & ~jnp.any(after.undecided, axis=1)),
            editing_steps=steps,
        )

    def done(self, state: EditingState) -> Array:
        return state.settled
