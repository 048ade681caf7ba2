"""Writing canvas by canvas: each is cleared in a few passes over a cache that holds all clean text before it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import BlockCausal, Causal
from diffusion_lm.samplers.base import (
    CachedDenoiser,
    Canvas,
    CanvasSampler,
    Generation,
    History,
    Prompt,
    Stage,
    TextSampler,
    decode_loop,
    fold_in_rows,
)

Array = jax.Array


@struct.dataclass
class BlockState:
    """The carry of `BlockDiffusion`.

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
class BlockDiffusion(TextSampler):
    """Clears canvases of `canvas` positions with `sampler`, one after the other; with align 1 the last one is only as
    wide as what is left to write. Where given text stands behind prompts, so that rows are of several lengths, it is as
    wide as all others, and what it has beyond its row's text is neither seen nor written.

    clean   how finished text is read into the cache: causally, or block by block (then `align` is the block)
    align   a canvas begins at a multiple of this; what the prompt has beyond the last multiple is given inside the
            first canvas. 1 puts the whole prompt into the cache; 0 puts all of it into the canvas, and nothing is ever
            read into the cache: for a model that only reads both ways, with `canvas` wide enough for all
    """

    sampler: CanvasSampler
    canvas: int
    mask: int
    eos: int
    clean: Causal | BlockCausal = Causal()  # noqa: RUF009  (frozen)
    align: int = 1
    record: bool = False

    def __post_init__(self):
        if self.canvas < 1:
            raise ValueError(f"canvas must be at least 1, not {self.canvas}")
        if self.align < 0 or (self.align and self.canvas % self.align):
            raise ValueError(f"canvas={self.canvas} must be a multiple of align={self.align}, and align at least 0")
        if self.align and isinstance(self.clean, BlockCausal) and self.align != self.clean.block_size:
            raise ValueError(f"text read in blocks of {self.clean.block_size} needs align={self.clean.block_size}")

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

    def phases(self, length: int) -> tuple[Stage, ...]:
        """Whole canvases, and a narrower one for what is left."""
        whole = Stage(sampler=self, steps=self._whole(length), reads=None if self.record else self.canvas)
        rest = length % self.canvas if self.align == 1 else 0
        last = Stage(sampler=dataclasses.replace(self, canvas=rest), steps=1) if rest else None
        return tuple(phase for phase in (whole if whole.steps else None, last) if phase)

    def answer(self, state: BlockState, *, length: int) -> Generation:
        at = state.prompt[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(state.text, at, axis=1)
        beyond = at >= state.goal[:, None]
        ended = jnp.cumsum((tokens == self.eos) | (tokens == self.mask) | beyond, axis=1) > 0
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

    def step(self, model: CachedDenoiser, state: BlockState) -> BlockState:
        """One canvas: clear it, write it down, and read it into the cache unless nobody goes on."""
        canvas, trace = self.cleared(model, state)
        state = self.written(state, canvas, trace)
        cache, committed = self._commit(model, state.cache, canvas.tokens, state.finished)
        return state.replace(nfe=state.nfe + committed, cache=cache)

    def cleared(self, model: CachedDenoiser, state: BlockState) -> tuple[Canvas, tuple[Array, Array] | None]:
        """The next canvas, all passes made, and what `record` has to show for them."""
        return decode_loop(
            self.sampler,
            self._denoise(model, state),
            self.sampler.begin(self._blank(state)),
            self.sampler.passes,
            record=_picture if self.record else None,
        )

    def written(self, state: BlockState, canvas: Canvas, trace: tuple[Array, Array] | None = None) -> BlockState:
        """The carry with a cleared canvas in its text, which the cache has not read."""
        ended = jnp.any((canvas.tokens == self.eos) & ~canvas.fixed, axis=1)
        return state.replace(
            text=_write(state.text, canvas.tokens, state.filled, ~state.finished),
            filled=state.filled + jnp.where(state.finished, 0, self.canvas),
            finished=state.finished | ended | (state.filled + self.canvas >= state.goal),
            begun=state.begun + 1,
            nfe=state.nfe + canvas.passes,
            history=self._recorded(state, canvas, trace),
        )

    def done(self, state: BlockState) -> Array:
        if state.inside is not None:
            return state.finished
        narrow = (self.align == 1) & (state.goal - state.filled < self.canvas)  # the next phase's
        return state.finished | narrow

    def begin(self, model: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> BlockState:
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
        return BlockState(
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
            confidence=jnp.zeros(shape),
            start=jnp.zeros((canvases, rows), jnp.int32),
            made=jnp.zeros(canvases, jnp.int32),
        )

    def _recorded(self, state: BlockState, canvas: Canvas, trace: tuple[Array, Array] | None) -> History | None:
        """The history with this canvas; a narrow one leaves the rest of its width masked."""
        if not self.record:
            return None
        now, history = state.begun, state.history
        tokens, confidence = trace
        here = (slice(None), slice(None), slice(self.canvas))
        return History(
            tokens=history.tokens.at[now, *here].set(tokens),
            confidence=history.confidence.at[now, *here].set(confidence),
            start=history.start.at[now].set(state.filled),
            made=history.made.at[now].set(canvas.passes),
        )

    def _denoise(self, model: CachedDenoiser, state: BlockState) -> "_Behind":
        """What the canvas's sampler asks: the network behind the cache; no end of text where given text follows."""
        if state.inside is None:
            return _Behind(model, state.cache, None, None, self.eos)
        slot = self._slots(state)
        text = (~self._beyond(state, slot)).astype(jnp.int32) if self.align == 1 else None
        return _Behind(model, state.cache, slot < state.inside[:, None], text, self.eos)

    def _slots(self, state: BlockState) -> Array:
        """int32 [B, K]: where the next canvas stands."""
        return state.filled[:, None] + jnp.arange(self.canvas, dtype=jnp.int32)[None]

    def _beyond(self, state: BlockState, slot: Array) -> Array:
        """bool [B, K]: behind the end of a row whose text has a given length; canvases at multiples of more than one
        position, as networks that read whole blocks or rows know them, are written to their ends."""
        if self.align != 1 or state.inside is None:
            return jnp.zeros_like(slot, bool)
        return slot >= state.goal[:, None]

    def _blank(self, state: BlockState) -> Canvas:
        """Masks at each row's next slots, but what is given there; a finished row has none open."""
        slot = self._slots(state)
        there = jnp.take_along_axis(state.text, jnp.minimum(slot, state.text.shape[1] - 1), axis=1)
        stands = (there != self.mask) & (slot < state.text.shape[1])
        fixed = stands | self._beyond(state, slot)
        return Canvas(
            tokens=jnp.where(stands, there, self.mask),
            undecided=~fixed & ~state.finished[:, None],
            fixed=fixed,
            confidence=fixed.astype(jnp.float32),
            keys=fold_in_rows(state.keys, state.begun),
            passes=jnp.zeros((), jnp.int32),
        )

    def _commit(self, model: CachedDenoiser, cache: Any, tokens: Array, finished: Array) -> tuple[Any, Array]:
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

    model: CachedDenoiser
    cache: Any
    inside: Array | None
    text: Array | None
    eos: int

    def __call__(self, tokens: Array, t: Array, **vectors) -> Array:
        vectors |= {} if self.text is None else {"segment_ids": self.text}
        logits = self.model.read_canvas(self.cache, tokens, t, **vectors)
        if self.inside is None:
            return logits
        end = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None] == self.eos
        return jnp.where(self.inside[..., None] & end, -jnp.inf, logits)

    def expected_embedding(self, logits: Array) -> Array:
        return self.model.expected_embedding(logits)


def _picture(canvas: Canvas) -> tuple[Array, Array]:
    return canvas.tokens, canvas.confidence


def _write(text: Array, canvas: Array, start: Array, rows: Array) -> Array:
    """text [B, S] with canvas [B, K] at slot start[b] of the chosen rows."""

    def one(row, piece, at, chosen):
        return jnp.where(chosen, jax.lax.dynamic_update_slice(row, piece, (at,)), row)

    return jax.vmap(one)(text, canvas, start, rows)
