"""Writing canvas by canvas: each is cleared in a few passes over a cache that holds all clean text before it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import Canvas, Generation, History, Model, Prompt, Sampler, row_keys, run
from diffusion_lm.types import BlockCausal, Causal

Array = jax.Array


@struct.dataclass
class Writing:
    """The carry of `Canvases`.

    text      int32 [B, S]  prompts and what was written behind them, in the cache's slots
    filled    int32 [B]     slots of text that are final: where the next canvas begins
    prompt    int32 [B]     length of the prompt
    goal      int32 [B]     slots at which the row has all that was asked for
    finished  bool [B]      reached its goal or an end of text
    begun     int32 []      canvases
    nfe       int32 []      forward passes
    keys      [B]           a random key a row
    cache     what has been read of each row
    last      History of the last canvas, if recorded
    """

    text: Array
    filled: Array
    prompt: Array
    goal: Array
    finished: Array
    begun: Array
    nfe: Array
    keys: Array
    cache: Any
    last: History | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Canvases:
    """Clears canvases of `canvas` positions with `sampler`, one after the other; with align 1 the last one is only as
    wide as what is left to write.

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

    def canvases(self, length: int) -> int:
        """How many canvases hold `length` new tokens, at worst."""
        return -(-(length + max(self.align, 1) - 1) // self.canvas)

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have; none for a model that only reads both ways."""
        if self.align == 1:
            return prompt + length
        return prompt + self.canvases(length) * self.canvas if self.align else 0

    def generate(self, model: Model, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> Generation:
        """Writes at most `length` tokens behind each prompt; prompts of different lengths go together."""
        width = prompt.tokens.shape[1]
        if not self.align and self.canvas < width + length:
            raise ValueError(f"a canvas of {self.canvas} doesn't hold a prompt of {width} and {length} new tokens")
        state, history = self.begun(model, cache, prompt, keys, length=length)
        tokens, count = self._answer(state, length)
        return Generation(tokens=tokens, length=count, nfe=state.nfe, cache=state.cache, history=history)

    def begun(
        self, model: Model, cache: Any, prompt: Prompt, keys: Array, *, length: int, most: int | None = None
    ) -> tuple[Writing, History | None]:
        """The carry after all canvases that `length` takes, or after `most` of them."""
        whole, rest = (
            divmod(length, self.canvas) if self.align == 1 else (self.canvases(length) if self.align else 1, 0)
        )
        if most is not None:
            whole, rest = min(whole, most), 0 if most <= whole else rest
        state = self._begin(model, cache, prompt, keys, length, prompt.tokens.shape[1] + self._room(length))
        record = (lambda s: s.last) if self.record else None
        state, history = run(self, model, state, whole, record=record) if whole else (state, None)
        if not rest:
            return state, history
        state = dataclasses.replace(self, canvas=rest).step(model, state)
        return state, self._with_last(history, state.last) if self.record else None

    def _room(self, length: int) -> int:
        if not self.align:
            return self.canvas
        return length if self.align == 1 else self.canvases(length) * self.canvas

    def _with_last(self, history: History | None, last: History) -> History:
        """All canvases' history with that of a narrow last one, filled up with masks."""
        beyond = [(0, 0), (0, 0), (0, self.canvas - last.tokens.shape[2])]
        last = last.replace(
            tokens=jnp.pad(last.tokens, beyond, constant_values=self.mask),
            probability=jnp.pad(last.probability, beyond),
        )
        last = jax.tree.map(lambda a: a[None], last)
        return last if history is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), history, last)

    def step(self, model: Model, state: Writing) -> Writing:
        """One canvas: clear it, write it down, and read it into the cache unless nobody goes on."""
        canvas, trace = run(
            self.sampler,
            lambda tokens, t: model.read_canvas(state.cache, tokens, t),
            self.sampler.begin(self._blank(state)),
            self.sampler.passes,
            record=_picture if self.record else None,
        )
        ended = jnp.any((canvas.tokens == self.eot) & ~canvas.given, axis=1)
        finished = state.finished | ended | (state.filled + self.canvas >= state.goal)
        last = None
        if self.record:
            last = History(tokens=trace[0], probability=trace[1], start=state.filled, made=canvas.passes)
        cache, committed = self._commit(model, state.cache, canvas.tokens, finished)
        return state.replace(
            text=_write(state.text, canvas.tokens, state.filled, ~state.finished),
            filled=state.filled + jnp.where(state.finished, 0, self.canvas),
            finished=finished,
            begun=state.begun + 1,
            nfe=state.nfe + canvas.passes + committed,
            cache=cache,
            last=last,
        )

    def done(self, state: Writing) -> Array:
        return state.finished

    def _begin(self, model: Model, cache: Any, prompt: Prompt, keys: Array, length: int, slots: int) -> Writing:
        """Reads each prompt's whole multiples of `align` into the cache."""
        rows, width = prompt.tokens.shape
        cached = prompt.length // self.align * self.align if self.align else jnp.zeros_like(prompt.length)
        read = 1 if self.align and width >= self.align else 0
        if read:
            _, cache = model.extend(cache, prompt.tokens, cached, self.clean)
        state = Writing(
            text=jnp.pad(prompt.tokens, ((0, 0), (0, slots - width)), constant_values=self.mask),
            filled=cached,
            prompt=prompt.length,
            goal=prompt.length + length,
            finished=jnp.zeros(rows, bool),
            begun=jnp.zeros((), jnp.int32),
            nfe=jnp.full((), read, jnp.int32),
            keys=keys,
            cache=cache,
        )
        if not self.record:
            return state
        shape = (self.sampler.passes, rows, self.canvas)
        nothing = History(
            tokens=jnp.zeros(shape, jnp.int32),
            probability=jnp.zeros(shape),
            start=cached,
            made=jnp.zeros((), jnp.int32),
        )
        return state.replace(last=nothing)

    def _blank(self, state: Writing) -> Canvas:
        """Masks at each row's next slots, what lies there of its prompt given; a finished row has none open."""
        slot = state.filled[:, None] + jnp.arange(self.canvas, dtype=jnp.int32)[None]
        given = slot < state.prompt[:, None]
        prompt = jnp.take_along_axis(state.text, jnp.minimum(slot, state.text.shape[1] - 1), axis=1)
        return Canvas(
            tokens=jnp.where(given, prompt, self.mask),
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

    def _answer(self, state: Writing, length: int) -> tuple[Array, Array]:
        """The `length` tokens behind each prompt, the mask from the end of text on, and how many come before it."""
        at = state.prompt[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(state.text, at, axis=1)
        ended = jnp.cumsum((tokens == self.eot) | (tokens == self.mask), axis=1) > 0
        return jnp.where(ended, self.mask, tokens), jnp.sum(~ended, axis=1, dtype=jnp.int32)


def _picture(canvas: Canvas) -> tuple[Array, Array]:
    return canvas.tokens, canvas.probability


def _write(text: Array, canvas: Array, start: Array, rows: Array) -> Array:
    """text [B, S] with canvas [B, K] at slot start[b] of the chosen rows."""

    def one(row, piece, at, chosen):
        return jnp.where(chosen, jax.lax.dynamic_update_slice(row, piece, (at,)), row)

    return jax.vmap(one)(text, canvas, start, rows)
