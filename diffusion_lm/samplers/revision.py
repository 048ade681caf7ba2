"""Revision: when a canvas is full, its least sure span is masked and written again, and kept if it reads better."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import Canvas, CanvasSampler, fold_in_rows

Array = jax.Array
_NEXT_ROUND = 2**31 - 1  # a count of passes that no sampler draws with


@struct.dataclass
class RevisionState(Canvas):
    """A canvas and what a round needs to know.

    span             bool [B, K]     being written again; none before the first round and after the last
    tried            bool [B, K]     the span that begins here was tried since the text last changed
    old              int32 [B, K]    the text as the round found it
    old_confidence  float32 [B, K]  and what it was committed with
    round            int32 []        counted from 1; 0 is the first writing
    within           int32 []        passes that the inner sampler has made of its own
    """

    span: Array
    tried: Array
    old: Array
    old_confidence: Array
    round: Array
    within: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revision:
    """Fills the canvas with `sampler` (one that clears masks: `Confidence`, or `Ancestral` on `Absorbing`), then makes
    `rounds` rounds, in each row for itself.

    A round masks `span` neighbouring free positions, those whose tokens were committed with the lowest mean
    probability; `sampler` fills them, in as many passes at most; one more pass reads the canvas with the span masked
    and scores what stood there and what stands there now by their mean log probability in that reading, so that
    neither vouches for itself. The better one stays, the old one if they are equal, with the probabilities of that
    reading. A span is not tried twice on the same text; with all tried, a row is done. Given positions stay as they
    are, as does what repeats an end of text until that end is written over.

    This seeks likely texts: what it writes does not follow the network's distribution.
    """

    sampler: CanvasSampler
    rounds: int
    span: int
    mask: int

    def __post_init__(self):
        if self.rounds < 0 or self.span < 1:
            raise ValueError(f"rounds must be at least 0 and span at least 1, not {self.rounds} and {self.span}")

    @property
    def passes(self) -> int:
        """The most passes a canvas."""
        return self.sampler.passes + self.rounds * (self._refill + 1)

    @property
    def _refill(self) -> int:
        return min(self.span, self.sampler.passes)

    @property
    def _first_of_round(self) -> int:
        """Which of the inner sampler's passes a round begins with."""
        return self.sampler.passes - self._refill

    def begin(self, canvas: Canvas) -> RevisionState:
        canvas, none = self.sampler.begin(canvas), jnp.zeros_like(canvas.undecided)
        return RevisionState(
            **{field.name: getattr(canvas, field.name) for field in dataclasses.fields(Canvas)},
            span=none,
            tried=none,
            old=canvas.tokens,
            old_confidence=canvas.confidence,
            round=jnp.zeros((), jnp.int32),
            within=jnp.zeros((), jnp.int32),
        )

    def step(self, denoise, state: RevisionState) -> RevisionState:
        """The inner sampler's pass, or, where it has nothing to do in any row, the pass that judges."""
        judging, heard = ~jnp.any(state.undecided), []
        blank = state.span & judging

        def listen(tokens, t):
            heard.append(denoise(tokens, t))
            return heard[-1]

        seen = state.replace(
            tokens=jnp.where(blank, self.mask, state.tokens),
            undecided=state.undecided | blank,
            passes=jnp.where(judging, self._first_of_round, state.within),
        )
        filled = self.sampler.step(listen, seen)
        filled = filled.replace(within=filled.passes, passes=state.passes + 1)
        state = jax.lax.cond(
            judging, lambda: self._judged(state.replace(passes=state.passes + 1), heard[-1]), lambda: filled
        )
        ready = judging | ((state.round == 0) & ~jnp.any(state.undecided))
        return jax.lax.cond(ready & (state.round < self.rounds), self._begun, lambda state: state, state)

    def done(self, state: RevisionState) -> Array:
        return ~jnp.any(state.undecided | state.span, axis=1)

    def _judged(self, state: RevisionState, logits: Array) -> RevisionState:
        """The better text of each row's span, by what is said of it with the span masked."""
        log_p = jax.nn.log_softmax(self.sampler.draw.allowed(logits), axis=-1)
        new, old = (self._said(log_p, state.replace(tokens=tokens)) for tokens in (state.tokens, state.old))
        keep = (_mean(new, state.span) > _mean(old, state.span))[:, None]
        tokens, said = jnp.where(keep, state.tokens, state.old), jnp.where(keep, new, old)
        was = jnp.where(keep, state.confidence, state.old_confidence)
        return state.replace(
            tokens=tokens,
            confidence=jnp.where(state.span & ~jnp.isnan(said), jnp.exp(said), was),
            tried=state.tried & ~keep,
            span=jnp.zeros_like(state.span),
        )

    def _said(self, log_p: Array, state: RevisionState) -> Array:
        """float32 [B, K]: log probability of each token, nan where it only repeats an end of text."""
        said = jnp.take_along_axis(log_p, jnp.minimum(state.tokens, log_p.shape[-1] - 1)[..., None], axis=-1)[..., 0]
        return jnp.where(_behind_end(state, self.sampler.eos), jnp.nan, said)

    def _begun(self, state: RevisionState) -> RevisionState:
        """The next round: each row's least sure span that was not tried is open again."""
        free = ~state.fixed & ~_behind_end(state, self.sampler.eos) & (state.tokens != self.mask)
        confidence = jnp.where(free, state.confidence, 0.0)
        count, rank = jnp.sum(free, axis=1, keepdims=True), jnp.cumsum(free, axis=1) - 1
        width = jnp.minimum(self.span, count)
        # the sum over a span is what has been summed up at its last position, less what had been before its first
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
            within=jnp.full((), self._first_of_round, jnp.int32),
        )


def _mean(values: Array, where: Array) -> Array:
    return jnp.nanmean(jnp.where(where, values, jnp.nan), axis=1)


def _behind_end(state: Canvas, eos: int) -> Array:
    """bool [B, K]: repeats an end of text that is not the prompt's."""
    ends = (state.tokens == eos) & ~state.fixed
    return ((jnp.cumsum(ends, axis=1) - ends) > 0) & ~state.fixed
