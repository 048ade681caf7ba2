"""Revision: the least certain span of a full canvas is masked and denoised again, and kept if it is more probable."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import (
    Canvas,
    CanvasSampler,
    Query,
    after_eos,
    fields_of,
    fold_in_rows,
    gather_tokens,
)

Array = jax.Array
_NEXT_ROUND = 2**31 - 1  # a count of steps that no sampler draws with


@struct.dataclass
class RevisionState(Canvas):
    """A canvas and the state of a round.

    span            bool [B, K]     being rewritten; none before the first round and after the last
    tried           bool [B, K]     the span that begins here was tried since the text last changed
    old             int32 [B, K]    the text before the round
    old_confidence  float32 [B, K]  and its confidence
    round           int32 []        counted from 1; 0 is the first denoising
    inner_step      int32 []        steps of the inner sampler
    """

    span: Array
    tried: Array
    old: Array
    old_confidence: Array
    round: Array
    inner_step: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revision(CanvasSampler):
    """Denoises the canvas with `sampler` (one that unmasks: `Confidence`, or `Ancestral` on `Absorbing`), then makes
    `rounds` rounds, in each row for itself.

    A round masks `span` neighbouring free positions, those with the lowest mean probability when committed; `sampler`
    fills them in at most as many steps. One more pass, with the span masked, scores the old and the new tokens by their
    mean log probability, so that neither conditions on itself. The better text stays, the old one if they are equal,
    with the probabilities of that pass. A span is not tried twice on the same text; with all tried, a row is done.
    Fixed positions stay, as do repeats of an end of text until that end is overwritten.

    This favours likely texts: it does not follow the network's distribution.
    """

    sampler: CanvasSampler
    rounds: int
    span: int
    mask: int

    def __post_init__(self):
        if self.rounds < 0 or self.span < 1:
            raise ValueError(f"rounds must be at least 0 and span at least 1; got {self.rounds} and {self.span}")

    @property
    def denoising_steps(self) -> int:
        """The most steps a canvas."""
        return self.sampler.denoising_steps + self.rounds * (self._refill_steps + 1)

    @property
    def _refill_steps(self) -> int:
        return min(self.span, self.sampler.denoising_steps)

    def init(self, canvas: Canvas) -> RevisionState:
        canvas, none = self.sampler.init(canvas), jnp.zeros_like(canvas.undecided)
        zero = jnp.zeros((), jnp.int32)
        return RevisionState(
            **fields_of(canvas), span=none, tried=none, old=canvas.tokens, old_confidence=canvas.confidence,
            round=zero, inner_step=zero,
        )  # fmt: skip

    def query(self, state: RevisionState) -> Query:
        return self.sampler.query(self._inner(state))

    def update(self, state: RevisionState, logits: Array) -> RevisionState:
        """The inner sampler's step or, where it has nothing to do in any row, the step that scores."""
        scoring = ~jnp.any(state.undecided)
        filled = self.sampler.update(self._inner(state), logits)
        filled = filled.replace(inner_step=filled.step, step=state.step + 1)
        state = jax.lax.cond(scoring, lambda: self._better(state.replace(step=state.step + 1), logits), lambda: filled)
        ready = scoring | ((state.round == 0) & ~jnp.any(state.undecided))
        return jax.lax.cond(ready & (state.round < self.rounds), self.masked, lambda state: state, state)

    def done(self, state: RevisionState) -> Array:
        return ~jnp.any(state.undecided | state.span, axis=1)

    def _inner(self, state: RevisionState) -> RevisionState:
        """The inner sampler's state; in the step that scores, with all spans masked."""
        scoring = ~jnp.any(state.undecided)
        blank = state.span & scoring
        first = self.sampler.denoising_steps - self._refill_steps
        return state.replace(
            tokens=jnp.where(blank, self.mask, state.tokens),
            undecided=state.undecided | blank,
            step=jnp.where(scoring, first, state.inner_step),
        )

    def _better(self, state: RevisionState, logits: Array) -> RevisionState:
        """The more probable text of each row's span, given logits of the canvas with the span masked."""
        log_p = jax.nn.log_softmax(self.sampler.sampling.allowed(logits), axis=-1)
        new, old = (  # nan where a token only repeats an end of text
            jnp.where(after_eos(tokens, state.fixed, self.sampler.eos), jnp.nan, gather_tokens(log_p, tokens))
            for tokens in (state.tokens, state.old)
        )
        new_mean, old_mean = (jnp.nanmean(jnp.where(state.span, a, jnp.nan), axis=1) for a in (new, old))
        keep = (new_mean > old_mean)[:, None]
        log_p = jnp.where(keep, new, old)
        confidence = jnp.where(keep, state.confidence, state.old_confidence)
        return state.replace(
            tokens=jnp.where(keep, state.tokens, state.old),
            confidence=jnp.where(state.span & ~jnp.isnan(log_p), jnp.exp(log_p), confidence),
            tried=state.tried & ~keep,
            span=jnp.zeros_like(state.span),
        )

    def masked(self, state: RevisionState) -> RevisionState:
        """The next round: each row's least certain span that was not tried is masked."""
        closed = after_eos(state.tokens, state.fixed, self.sampler.eos)
        free = ~state.fixed & ~closed & (state.tokens != self.mask)
        confidence = jnp.where(free, state.confidence, 0.0)
        count, rank = jnp.sum(free, axis=1, keepdims=True), jnp.cumsum(free, axis=1) - 1
        width = jnp.minimum(self.span, count)
        # the sum over a span is the running sum at its last position, less that before its first
        running = jnp.cumsum(confidence, axis=1)
        in_order = jnp.take_along_axis(running, jnp.argsort(~free, axis=1, stable=True), axis=1)
        end = jnp.clip(rank + width - 1, 0, free.shape[1] - 1)
        total = jnp.take_along_axis(in_order, end, axis=1) - running + confidence
        fits = free & (rank + width <= count) & ~state.tried
        start = jnp.argmin(jnp.where(fits, total, jnp.inf), axis=1, keepdims=True)
        first = jnp.take_along_axis(rank, start, axis=1)
        some = jnp.any(fits, axis=1, keepdims=True)
        span = some & free & (rank >= first) & (rank < first + width)
        here = some & (jnp.arange(free.shape[1], dtype=jnp.int32)[None] == start)
        return state.replace(
            tokens=jnp.where(span, self.mask, state.tokens),
            confidence=jnp.where(span, 0.0, state.confidence),
            undecided=span,
            keys=fold_in_rows(state.keys, _NEXT_ROUND),
            span=span,
            tried=state.tried | here,
            old=state.tokens,
            old_confidence=state.confidence,
            round=state.round + 1,
            inner_step=jnp.full((), self.sampler.denoising_steps - self._refill_steps, jnp.int32),
        )
