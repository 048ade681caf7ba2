"""Writing canvas by canvas: each is cleared in a few passes over a cache that holds all clean text before it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import (
    Canvas,
    Generation,
    History,
    Model,
    Phase,
    Prompt,
    Sampler,
    Writer,
    row_keys,
    run,
)
from diffusion_lm.types import BlockCausal, Causal

Array = jax.Array


@struct.dataclass
class Writing:
    """The carry of `Canvases`.

    text      int32 [B, S]  prompts and what was written or is given behind them, in the cache's slots
    filled    int32 [B]     slots of text that are final: where the next canvas begins
    prompt    int32 [B]     length of the prompt
    goal      int32 [B]     slots at which the row has all that was asked for
    inside    int32 [B]     the slot of the last token that is given: no text ends before it. None: only prompts are
    finished  bool [B]      reached its goal or an end of text
    begun     int32 []      canvases
    nfe       int32 []      forward passes
    keys      [B]           a random key a row
    cache     what has been read of each row
    history   History of all canvases, if recorded
    """

    text: Array
    filled: Array
    prompt: Array
    goal: Array
    inside: Array | None
    finished: Array
    begun: Array
    nfe: Array
    keys: Array
    cache: Any
    history: History | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Canvases(Writer):
    """Clears canvases of `canvas` positions with `sampler`, one after the other; with align 1 the last one is only as
    wide as what is left to write. Where given text stands behind prompts, so that rows are of several lengths, it is as
    wide as all others, and what it has beyond its row's text is neither seen nor written.

    clean   how finished text is read into the cache: causally, or block by block (then `align` is the block)
    align   a canvas begins at a multiple of this; what the prompt has beyond the last multiple is given inside the
            first canvas. 1 puts the whole prompt into the cache; 0 puts all of it into the canvas, and nothing is ever
            read into the cache: for a model that only reads both ways, with `canvas` wide enough for all
    """

    sampler: Sampler
    canvas: int
    mask: int
    eot: int
    clean: Causal | BlockCausal = Causal()  # noqa: RUF009  (a named tuple: immutable)
    align: int = 1
    record: bool = False

    def __post_init__(self):
        if self.canvas < 1:
            raise ValueError(f"canvas must be at least 1, not {self.canvas}")
        if self.align < 0 or (self.align and self.canvas % self.align):
            raise ValueError(f"canvas={self.canvas} must be a multiple of align={self.align}, and align at least 0")
        if self.align and isinstance(self.clean, BlockCausal) and self.align != self.clean.block:
            raise ValueError(f"text read in blocks of {self.clean.block} needs align={self.clean.block}")

    @property
    def separable(self) -> bool:
        return not self.record

    def canvases(self, length: int) -> int:
        """How many canvases hold `length` new tokens, at worst."""
        return -(-(length + max(self.align, 1) - 1) // self.canvas)

    def width(self, length: int) -> int:
        return self.canvas

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have; none for a model that only reads both ways."""
        if self.align == 1:
            return prompt + length
        return prompt + self.canvases(length) * self.canvas if self.align else 0

    def phases(self, length: int) -> tuple[Phase, ...]:
        """Whole canvases, and a narrower one for what is left."""
        whole = Phase(sampler=self, steps=self._whole(length), reads=None if self.record else self.canvas)
        rest = length % self.canvas if self.align == 1 else 0
        last = Phase(sampler=dataclasses.replace(self, canvas=rest), steps=1) if rest else None
        return tuple(phase for phase in (whole if whole.steps else None, last) if phase)

    def answer(self, state: Writing, *, length: int) -> Generation:
        at = state.prompt[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(state.text, at, axis=1)
        beyond = at >= state.goal[:, None]
        ended = jnp.cumsum((tokens == self.eot) | (tokens == self.mask) | beyond, axis=1) > 0
        return Generation(
            tokens=jnp.where(ended, self.mask, tokens),
            length=jnp.sum(~ended, axis=1, dtype=jnp.int32),
            nfe=state.nfe,
            cache=state.cache,
            history=state.history,
        )

    def _whole(self, length: int) -> int:
        if self.align == 1:
            return length // self.canvas
        return self.canvases(length) if self.align else 1

    def _room(self, length: int) -> int:
        if not self.align:
            return self.canvas
        return length if self.align == 1 else self.canvases(length) * self.canvas

    def step(self, model: Model, state: Writing) -> Writing:
        """One canvas: clear it, write it down, and read it into the cache unless nobody goes on."""
        canvas, trace = self.cleared(model, state)
        state = self.written(state, canvas, trace)
        cache, committed = self._commit(model, state.cache, canvas.tokens, state.finished)
        return state.replace(nfe=state.nfe + committed, cache=cache)

    def cleared(self, model: Model, state: Writing) -> tuple[Canvas, tuple[Array, Array] | None]:
        """The next canvas, all passes made, and what `record` has to show for them."""
        return run(
            self.sampler,
            self._denoise(model, state),
            self.sampler.begin(self._blank(state)),
            self.sampler.passes,
            record=_picture if self.record else None,
        )

    def written(self, state: Writing, canvas: Canvas, trace: tuple[Array, Array] | None = None) -> Writing:
        """The carry with a cleared canvas in its text, which the cache has not read."""
        ended = jnp.any((canvas.tokens == self.eot) & ~canvas.given, axis=1)
        return state.replace(
            text=_write(state.text, canvas.tokens, state.filled, ~state.finished),
            filled=state.filled + jnp.where(state.finished, 0, self.canvas),
            finished=state.finished | ended | (state.filled + self.canvas >= state.goal),
            begun=state.begun + 1,
            nfe=state.nfe + canvas.passes,
            history=self._recorded(state, canvas, trace),
        )

    def done(self, state: Writing) -> Array:
        if state.inside is not None:
            return state.finished
        narrow = (self.align == 1) & (state.goal - state.filled < self.canvas)  # the next phase's
        return state.finished | narrow

    def begin(self, model: Model, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> Writing:
        """Reads each prompt's whole multiples of `align` into the cache."""
        rows, width = prompt.tokens.shape
        least = length + (width if prompt.wanted is None else 0)  # who laid rows of several lengths knows if they fit
        if not self.align and self.canvas < least:
            raise ValueError(f"a canvas of {self.canvas} doesn't hold a prompt of {width} and {length} new tokens")
        cached = prompt.length // self.align * self.align if self.align else jnp.zeros_like(prompt.length)
        read = 1 if self.align and width >= self.align else 0
        if read:
            _, cache = model.extend(cache, prompt.tokens, cached, self.clean)
        tokens = jnp.where(jnp.arange(width, dtype=jnp.int32)[None] < prompt.length[:, None], prompt.tokens, self.mask)
        text, inside = jnp.pad(tokens, ((0, 0), (0, self._room(length))), constant_values=self.mask), None
        if prompt.behind is not None:
            text = _write(text, prompt.behind, prompt.length, jnp.ones(rows, bool))
            at = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
            inside = jnp.max(jnp.where(text != self.mask, at, 0), axis=1)
        return Writing(
            text=text,
            filled=cached,
            prompt=prompt.length,
            goal=prompt.length + (length if prompt.wanted is None else prompt.wanted),
            inside=inside,
            finished=jnp.zeros(rows, bool),
            begun=jnp.zeros((), jnp.int32),
            nfe=jnp.full((), read, jnp.int32),
            keys=keys,
            cache=cache,
            history=self._no_history(rows, length) if self.record else None,
        )

    def _no_history(self, rows: int, length: int) -> History:
        canvases = self._whole(length) + (self.align == 1 and length % self.canvas > 0)
        shape = (canvases, self.sampler.passes, rows, self.canvas)
        return History(
            tokens=jnp.full(shape, self.mask, jnp.int32),
            probability=jnp.zeros(shape),
            start=jnp.zeros((canvases, rows), jnp.int32),
            made=jnp.zeros(canvases, jnp.int32),
        )

    def _recorded(self, state: Writing, canvas: Canvas, trace: tuple[Array, Array] | None) -> History | None:
        """The history with this canvas; a narrow one leaves the rest of its width masked."""
        if not self.record:
            return None
        now, history = state.begun, state.history
        tokens, probability = trace
        here = (slice(None), slice(None), slice(self.canvas))
        return History(
            tokens=history.tokens.at[now, *here].set(tokens),
            probability=history.probability.at[now, *here].set(probability),
            start=history.start.at[now].set(state.filled),
            made=history.made.at[now].set(canvas.passes),
        )

    def _denoise(self, model: Model, state: Writing) -> "_Behind":
        """What the canvas's sampler asks: the network behind the cache; no end of text where given text follows."""
        if state.inside is None:
            return _Behind(model, state.cache, None, None, self.eot)
        slot = self._slots(state)
        text = (~self._beyond(state, slot)).astype(jnp.int32) if self.align == 1 else None
        return _Behind(model, state.cache, slot < state.inside[:, None], text, self.eot)

    def _slots(self, state: Writing) -> Array:
        """int32 [B, K]: where the next canvas stands."""
        return state.filled[:, None] + jnp.arange(self.canvas, dtype=jnp.int32)[None]

    def _beyond(self, state: Writing, slot: Array) -> Array:
        """bool [B, K]: behind the end of a row whose text has a given length; canvases at multiples of more than one
        position, as networks that read whole blocks or rows know them, are written to their ends."""
        if self.align != 1 or state.inside is None:
            return jnp.zeros_like(slot, bool)
        return slot >= state.goal[:, None]

    def _blank(self, state: Writing) -> Canvas:
        """Masks at each row's next slots, but what is given there; a finished row has none open."""
        slot = self._slots(state)
        there = jnp.take_along_axis(state.text, jnp.minimum(slot, state.text.shape[1] - 1), axis=1)
        stands = (there != self.mask) & (slot < state.text.shape[1])
        given = stands | self._beyond(state, slot)
        return Canvas(
            tokens=jnp.where(stands, there, self.mask),
            open=~given & ~state.finished[:, None],
            given=given,
            probability=given.astype(jnp.float32),
            keys=row_keys(state.keys, state.begun),
            passes=jnp.zeros((), jnp.int32),
        )

    def _commit(self, model: Model, cache: Any, tokens: Array, finished: Array) -> tuple[Any, Array]:
        """Reads clean canvases of the rows that go on into the cache; returns it, and the passes this took."""
        if not self.align:
            return cache, jnp.zeros((), jnp.int32)

        def read(cache):
            count = jnp.where(finished, 0, self.canvas)
            return model.extend(cache, jnp.where(finished[:, None], 0, tokens), count, self.clean)[1]

        some = ~jnp.all(finished)
        return jax.lax.cond(some, read, lambda cache: cache, cache), some.astype(jnp.int32)


class _Behind(NamedTuple):
    """A network behind a cache; nothing ends where `inside` bool [B, K] (None: a text may end anywhere), and what is
    `text`, int32 [B, K], doesn't see what isn't (None: all is)."""

    model: Model
    cache: Any
    inside: Array | None
    text: Array | None
    eot: int

    def __call__(self, tokens: Array, t: Array, **vectors) -> Array:
        vectors |= {} if self.text is None else {"segments": self.text}
        logits = self.model.read_canvas(self.cache, tokens, t, **vectors)
        if self.inside is None:
            return logits
        end = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None] == self.eot
        return jnp.where(self.inside[..., None] & end, -jnp.inf, logits)

    def mean_vector(self, logits: Array) -> Array:
        return self.model.mean_vector(logits)


def _picture(canvas: Canvas) -> tuple[Array, Array]:
    return canvas.tokens, canvas.probability


def _write(text: Array, canvas: Array, start: Array, rows: Array) -> Array:
    """text [B, S] with canvas [B, K] at slot start[b] of the chosen rows."""

    def one(row, piece, at, chosen):
        return jnp.where(chosen, jax.lax.dynamic_update_slice(row, piece, (at,)), row)

    return jax.vmap(one)(text, canvas, start, rows)
