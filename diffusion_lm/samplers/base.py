"""What samplers step, and the one loop that drives them.

Two kinds of sampler, one driver. A canvas sampler (ancestral, confidence) clears one canvas pass by pass. A writer
(autoregressive, canvases) writes an answer piece by piece and keeps the cache; the writer of canvases runs the driver
on a canvas sampler for each piece.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import AttentionPattern
from diffusion_lm.types import LogitsHead

Array = jax.Array


class CachedDenoiser(Protocol):
    """All that a writer sees of a network (`nn.bound.Bound` is one). Caches have a `length`, int32 [B]."""

    def extend(self, cache: Any, tokens: Array, count: Array, attention: AttentionPattern) -> tuple[LogitsHead, Any]:
        """Reads the next count[b] of clean tokens [B, T]: what it says of all T, and the longer cache."""

    def fork(self, cache: Any, tokens: Array, count: Array, masks: int) -> tuple[LogitsHead, LogitsHead, Any]:
        """Reads clean tokens as `extend` does causally, and in the same pass a canvas of so many masks behind each of
        them, as `read_canvas` would at time 1. Says of all tokens, [B, T], and of all canvases, [B, T * masks]."""

    def truncate(self, cache: Any, count: Array) -> Any:
        """The cache without the last count[b] positions that row b read."""

    def resize(self, cache: Any, rows: Array, slots: int | None = None) -> Any:
        """The cache of the chosen rows, int32 [n], with at least as many slots as before (None: as many)."""

    def read_canvas(self, cache: Any, canvas: Array, t: Array, **vectors) -> Array:
        """float32 logits [B, K, V] of a noisy canvas [B, K] at times t [B] behind the cache; writes nothing.

        vectors: `soft` and `mixed` (see `types.Denoise`), where the network takes them; segment_ids int32 [B, K]: each
        position sees those of its own number, and all of the cache.
        """

    def expected_embedding(self, logits: Array) -> Array:
        """softmax(logits) [B, K, V] @ the pieces' vectors, float32 [B, K, E]: what such a network is fed."""


class CanvasSampler(Protocol):
    """A frozen dataclass that steps a typed carry. A canvas sampler also has `passes`, and `begin(canvas)`, which lays
    its noise on the open positions; its model is the network behind the cache: model(tokens, t, **vectors) and
    model.expected_embedding(logits), as `Model` has them."""

    def step(self, model: Any, state: Any) -> Any: ...

    def done(self, state: Any) -> Array:
        """bool [B]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of writing: `sampler` steps until every row is done, at most `steps` times.

    reads  the most positions that a step adds to the cache: a cache may be short and grow between steps. None: the
           phase needs every slot from the start
    enter  (model, state) -> the carry that `sampler` steps; None: what the phase before left
    """

    sampler: CanvasSampler
    steps: int
    reads: int | None = None
    enter: Callable[[Any, Any], Any] | None = None


class TextSampler(Protocol):
    """A frozen dataclass that answers prompts in phases. Arrays of its carry have rows first, apart from counts, which
    are []; it has the `cache`, `finished` bool [B], and `nfe` int32 [].

    separable  a row is written as it would be alone, and may leave the batch
    """

    separable = True

    def width(self, length: int) -> int:
        """Positions of a row that a pass reads at once (but for the prompt), if so many tokens are asked for."""
        del length
        return 1

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have for a prompt so wide."""

    def begin(self, model: "CachedDenoiser", cache: Any, prompt: "Prompt", keys: Array, *, length: int) -> Any:
        """The carry once the prompts are read."""

    def phases(self, length: int) -> tuple[Stage, ...]:
        """What follows, in order."""

    def answer(self, state: Any, *, length: int) -> "Generation":
        """At most `length` tokens behind each prompt."""

    def generate(
        self, model: "CachedDenoiser", cache: Any, prompt: "Prompt", keys: Array, *, length: int
    ) -> "Generation":
        """Writes at most `length` tokens behind each prompt; prompts of different lengths go together."""
        state = self.begin(model, cache, prompt, keys, length=length)
        for phase in self.phases(length):
            state = phase.enter(model, state) if phase.enter else state
            state, _ = decode_loop(phase.sampler, model, state, phase.steps)
        return self.answer(state, length=length)


@struct.dataclass
class Prompt:
    """tokens int32 [B, P], filled up on the right; length int32 [B], at least 1 (begin of text).

    behind  int32 [B, N] or None: what stands behind each prompt, the mask id where something is to be filled in. For
            canvases only: no writer from left to right can look ahead
    wanted  int32 [B] or None: how much of it is each row's text, which ends there; None: all of it
    """

    tokens: Array
    length: Array
    behind: Array | None = None
    wanted: Array | None = None


@struct.dataclass
class Canvas:
    """A canvas that is being cleared.

    tokens       int32 [B, K]    what stands there; the mask id where nothing does
    open         bool [B, K]     still to be written
    given        bool [B, K]     part of the prompt
    probability  float32 [B, K]  what the model gave the token when it was committed; 1 where given, 0 where open
    keys         [B]             a random key a row
    passes       int32 []        made so far
    """

    tokens: Array
    undecided: Array
    fixed: Array
    confidence: Array
    keys: Array
    passes: Array


@struct.dataclass
class History:
    """Each pass's canvas: tokens int32 and probability float32 [canvases, passes, B, K], start int32 [canvases, B]
    (the slot of a canvas's first position), made int32 [canvases] (passes made)."""

    tokens: Array
    confidence: Array
    start: Array
    made: Array


@struct.dataclass
class Generation:
    """tokens int32 [B, N], the mask id from the end of text on; length int32 [B], tokens before it; nfe int32 [],
    forward passes of the network, prompt and commits included; cache, to go on from; history, if recorded."""

    tokens: Array
    length: Array
    nfe: Array
    cache: Any
    history: History | None = None


def decode_loop(
    sampler: CanvasSampler,
    model: Any,
    state: Any,
    max_steps: int | Array,
    record: Callable[[Any], Any] | None = None,
    enough: int | Array = 0,
    room: int | Array | None = None,
):
    """Steps `state` until at most `enough` rows aren't done, or its cache has read more than `room` of a row, at most
    max_steps times: the one decoding loop.

    Returns (state, trace): trace stacks record(state) after each step on a leading axis of max_steps, or is None.
    """
    trace = None
    if record is not None:
        trace = jax.tree.map(lambda a: jnp.zeros((max_steps, *a.shape), a.dtype), jax.eval_shape(record, state))

    def going(carry):
        state, _, made = carry
        more = (made < max_steps) & (jnp.sum(~sampler.done(state)) > enough)
        return more if room is None else more & (jnp.max(state.cache.length) <= room)

    def body(carry):
        state, trace, made = carry
        state = sampler.step(model, state)
        if record is not None:
            trace = jax.tree.map(lambda all_, one: all_.at[made].set(one), trace, record(state))
        return state, trace, made + 1

    state, trace, _ = jax.lax.while_loop(going, body, (state, trace, jnp.zeros((), jnp.int32)))
    return state, trace


def commit(canvas: Canvas, chosen: Array, tokens: Array, confidence: Array, *, eos: int) -> Canvas:
    """The canvas after a pass that writes `tokens` at the chosen open positions.

    What follows an end of text is closed and repeats it (but what is given stays), as it did in training: it will not
    be returned. An eos of -1
    closes nothing, for networks that were trained on rows of several texts.
    """
    chosen = chosen & canvas.undecided
    tokens = jnp.where(chosen, tokens, canvas.tokens)
    confidence = jnp.where(chosen, confidence, canvas.confidence)
    ends = (tokens == eos) & ~canvas.fixed
    beyond = ((jnp.cumsum(ends, axis=1) - ends) > 0) & ~canvas.fixed
    return canvas.replace(
        tokens=jnp.where(beyond, eos, tokens),
        confidence=jnp.where(beyond, 0.0, confidence),
        undecided=canvas.undecided & ~chosen & ~beyond,
        passes=canvas.passes + 1,
    )


def fold_in_rows(keys: Array, count: Array) -> Array:
    """A fresh key a row for the count-th use: a row draws the same alone and in any batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)
