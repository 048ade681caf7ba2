"""Runs a writer: one program, or, where that saves something, programs that stop between steps while the cache grows
or the batch loses the rows that are finished."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.samplers.base import Generation, Prompt, Stage, TextSampler, decode_loop

Array = jax.Array
_FEWEST = 512  # slots that a cache begins with: reading fewer saves nothing that is worth another program


def drive(
    writer: TextSampler, model: Any, prompt: Prompt, keys: Array, *, length: int, compact: bool = False
) -> Generation:
    """What `writer.generate` writes, with a cache that is at most twice as long as what it holds.

    model    a `base.Model` with `empty_cache(rows, slots)`
    compact  when half of the rows or more have finished, the others go on in a smaller batch: each size compiles its
             own programs, which pays for long answers. The generation then has no cache to go on from

    Raises ValueError for `compact` where rows aren't written apart (a recording, a population).
    """
    rows, width = prompt.tokens.shape
    slots, phases = writer.slots(width, length), writer.phases(length)
    if compact and not writer.separable:
        raise ValueError("rows can't leave a batch that is recorded, or a population: leave compact out")
    if not (compact and rows > 1) and (slots <= _FEWEST or phases[0].reads is None):
        return _generate(model, model.empty_cache(rows, slots), prompt, keys, writer=writer, length=length)
    size = _size(width, phases[0], slots)
    state = _begin(model, model.empty_cache(rows, size), prompt, keys, writer=writer, length=length)
    batch = _Batch(writer, model, state, size, slots, length, compact)
    for index, phase in enumerate(phases):
        if phase.enter:
            batch.fit(_size(width, phase, slots))
            rest, cache = batch.state.replace(cache=None), batch.state.cache
            batch.state = _enter(model, cache, rest, writer=writer, length=length, index=index)
        batch.through(phase)
    return batch.answer()


class _Batch:
    """The rows still in the batch, their carry, and the answers of those that left."""

    def __init__(self, writer, model, state, size: int, slots: int, length: int, compact: bool):
        self.writer, self.model, self.state, self.length = writer, model, state, length
        self.size, self.slots, self.compact = size, slots, compact
        self.rows = np.arange(len(state.finished))
        self.tokens = np.zeros((len(self.rows), length), np.int32)
        self.count = np.zeros(len(self.rows), np.int32)

    def through(self, phase: Stage) -> None:
        """Steps until the phase is done."""
        plain = Stage(sampler=phase.sampler, steps=phase.steps)  # a bound `enter` would compile anew for each writer
        going = np.ones(1, bool)
        while going.any():
            room, enough = self._room(phase), len(self.rows) // 2 if self.compact else 0
            self.state, going = _advance(self.model, self.state, room, enough, phase=plain)
            going = np.asarray(going)
            if self.compact and going.any():
                self._let_go()

    def _room(self, phase: Stage) -> int:
        """The most that may be read where another step begins; the cache grows until one fits."""
        if self.size < self.slots and phase.reads != 0:
            read = 0 if phase.reads is None else int(self.state.cache.length.max())
            self.fit(_size(read, phase, self.slots))
        return self.slots if self.size == self.slots else self.size - phase.reads

    def fit(self, size: int) -> None:
        """The cache with so many slots."""
        if size > self.size:
            self.size = size
            self.state = _taken(self.model, self.state, np.arange(len(self.rows)), slots=size)

    def _let_go(self) -> None:
        """Halves the batch, once or more, where the rows that aren't finished fit into what is left."""
        finished = np.asarray(self.state.finished)
        size = 1 << max(int((~finished).sum()) - 1, 0).bit_length()
        if size >= len(self.rows):
            return
        self._note_answers()
        stay = np.argsort(finished, kind="stable")[:size]
        self.rows, self.state = self.rows[stay], _taken(self.model, self.state, stay, slots=self.size)

    def _note_answers(self) -> Generation:
        generation = _answer(self.state, writer=self.writer, length=self.length)
        self.tokens[self.rows], self.count[self.rows] = generation.tokens, generation.length
        return generation

    def answer(self) -> Generation:
        """All rows, those that left and those that stayed."""
        last = self._note_answers()
        if not self.compact:
            return last
        return last.replace(tokens=jnp.asarray(self.tokens), length=jnp.asarray(self.count), cache=None)


def _size(read: int, phase: Stage, slots: int) -> int:
    """The least power of two that holds what is read and one step more; at most all slots."""
    if phase.reads is None:
        return slots
    return min(slots, max(_FEWEST, 1 << (read + max(phase.reads, 1) - 1).bit_length()))


@functools.partial(jax.jit, static_argnames=("writer", "length"), donate_argnames=("cache",))
def _generate(model, cache, prompt, keys, *, writer, length) -> Generation:
    """One program for the whole generation; the cache is written in place."""
    return writer.generate(model, cache, prompt, keys, length=length)


@functools.partial(jax.jit, static_argnames=("writer", "length"), donate_argnames=("cache",))
def _begin(model, cache, prompt, keys, *, writer, length):
    return writer.begin(model, cache, prompt, keys, length=length)


@functools.partial(jax.jit, static_argnames=("writer", "length", "index"), donate_argnames=("cache",))
def _enter(model, cache, rest, *, writer, length, index):
    return writer.phases(length)[index].enter(model, rest.replace(cache=cache))


@functools.partial(jax.jit, static_argnames=("phase",), donate_argnames=("state",))
def _advance(model, state, room, enough, *, phase):
    """The carry once at most `enough` rows go on, or more than `room` is read; and which rows go on."""
    state, _ = decode_loop(phase.sampler, model, state, phase.steps, enough=enough, room=room)
    return state, ~phase.sampler.done(state)


@functools.partial(jax.jit, static_argnames=("slots",))
def _taken(model, state, rows, *, slots):
    cache = model.resize(state.cache, rows, slots)
    rest = jax.tree.map(lambda a: jnp.take(a, rows, axis=0) if a.ndim else a, state.replace(cache=None))
    return rest.replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("writer", "length"))
def _answer(state, *, writer, length) -> Generation:
    return writer.answer(state, length=length)
