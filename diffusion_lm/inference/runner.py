"""Runs a text sampler: as one program or, where that saves time, as programs that stop between steps while the cache
grows or finished rows leave the batch."""

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.samplers.base import Denoised, Generation, Prompt, Stage, TextSampler, decode_loop
from diffusion_lm.samplers.sampling_params import RowSampling, with_sampling

Array = jax.Array
log = logging.getLogger(__name__)
_asked: set[tuple] = set()  # what this process has been asked for, and so has compiled
_MIN_SLOTS = 512  # slots that a cache begins with: attending to fewer saves nothing that is worth another program


def run(
    sampler: TextSampler, network: Any, prompt: Prompt, keys: Array, *, max_new_tokens: int, drop_finished: bool = False
) -> Generation:
    """What `sampler.generate` returns, with a cache that is at most twice as long as what it holds.

    Args:
      sampler: the text sampler.
      network: a `CachedDenoiser` with `empty_cache(rows, slots)`.
      prompt: the prompts.
      keys: [B], a random key a row.
      max_new_tokens: tokens to generate, at most.
      drop_finished: when half of the rows or more have finished, the others continue in a smaller batch. Each size
        compiles its own programs, which pays for long answers. The generation then has no cache to continue from.

    Raises:
      ValueError: drop_finished where rows depend on their batch (a recording, particles).
    """
    rows, width = prompt.tokens.shape
    slots, stages = sampler.slots(width, max_new_tokens), sampler.stages(max_new_tokens)
    if drop_finished and not sampler.separable:
        raise ValueError("recorded rows and particles can't leave their batch: leave drop_finished out")
    static = {"sampler": sampler, "max_new_tokens": max_new_tokens}
    _say_what_compiles(network, prompt, (sampler, max_new_tokens, drop_finished))
    if not (drop_finished and rows > 1) and (slots <= _MIN_SLOTS or stages[0].cache_growth is None):
        return _generate(network, network.empty_cache(rows, slots), prompt, keys, **static)
    batch = _Batch(sampler, network, prompt, keys, max_new_tokens, drop_finished)
    for index in range(len(stages)):
        batch.run(batch.enter(index))
    return batch.generation()


class Snapshot(NamedTuple):
    """What is written after a forward pass, in numpy.

    tokens      int32 [B, N]    of which the first length[b] are final; the mask id where there is none yet
    length      int32 [B]
    confidence  float32 [B, N]  the network's probability of each token; None where the sampler doesn't say
    writer      int8 [B, N]     see `Generation`; None where the sampler doesn't say
    finished    bool [B]        rows that are complete
    nfe         forward passes so far
    """

    tokens: np.ndarray
    length: np.ndarray
    confidence: np.ndarray | None
    writer: np.ndarray | None
    finished: np.ndarray
    nfe: int


def snapshots(
    sampler: TextSampler,
    network: Any,
    prompt: Prompt,
    keys: Array,
    *,
    max_new_tokens: int,
    wanted: np.ndarray,
    sampling: RowSampling | None = None,
) -> Iterator[Snapshot]:
    """Generates as `run` does and shows what is written: after each token, round of drafts, or pass over a canvas.

    Args:
      wanted: bool [B]. A row that the caller sets to False is finished at the next token or after the current canvas.
        Finished rows leave the batch once half of it or more are.
      sampling: of each row, in place of the sampler's own.
      The others are those of `run`.

    Raises ValueError where rows depend on their batch (a recording, particles).
    """
    if not sampler.separable:
        raise ValueError("recorded rows and particles depend on their batch: they can't be shown as they are written")
    _say_what_compiles(network, prompt, (sampler, max_new_tokens, "snapshots"))
    batch = _Batch(sampler, network, prompt, keys, max_new_tokens, drop_finished=True, sampling=sampling)
    for index in range(len(batch.stages)):
        if wanted.any():
            yield from batch.passes(batch.enter(index), wanted)


def _say_what_compiles(network: Any, prompt: Prompt, options: tuple) -> None:
    """One line before the first generation of its shapes and options, which waits for its programs."""
    shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves((network, prompt)))
    if (asked := (jax.tree.structure((network, prompt)), shapes, options)) not in _asked:
        _asked.add(asked)
        log.info("compiling for %d rows and prompts of up to %d tokens: this happens once", *prompt.tokens.shape)


class _Batch:
    """The rows still in the batch, their state, and what is written of all rows."""

    def __init__(
        self, sampler, network, prompt: Prompt, keys: Array, max_new_tokens: int, drop_finished: bool, sampling=None
    ):
        rows, self.width = prompt.tokens.shape
        self.sampler, self.network, self.drop_finished = sampler, network, drop_finished
        self.static = {"sampler": sampler, "max_new_tokens": max_new_tokens}
        self.stages = sampler.stages(max_new_tokens)
        self.slots = sampler.slots(self.width, max_new_tokens)
        self.size = _size(self.width, self.stages[0], self.slots)
        cache, self.sampling = network.empty_cache(rows, self.size), sampling
        self.state = _init(network, cache, prompt, keys, sampling, **self.static)
        self.rows, self.written = np.arange(rows), {}

    def enter(self, index: int) -> Stage:
        """The index-th stage, entered. (A bound `enter` would always compile anew.)"""
        stage = self.stages[index]
        if stage.enter:
            self.grow(_size(self.width, stage, self.slots))
            rest, cache = self.state.replace(cache=None), self.state.cache
            self.state = _enter(self.network, cache, rest, index=index, **self.static)
        return Stage(stepper=stage.stepper, max_steps=stage.max_steps, cache_growth=stage.cache_growth)

    def run(self, stage: Stage) -> None:
        """Steps until the stage is done."""
        running = np.ones(1, bool)
        while running.any():
            self._grow_for(stage)
            # the most that may be cached where another step begins; the cache grows until one fits
            max_cached = self.slots if self.size == self.slots else self.size - stage.cache_growth
            max_running = len(self.rows) // 2 if self.drop_finished else 0
            self.state, running = _advance(self.network, self.state, max_cached, max_running, stage=stage)
            running = np.asarray(running)
            if self.drop_finished and running.any():
                self._drop_finished()

    def passes(self, stage: Stage, wanted: np.ndarray) -> Iterator[Snapshot]:
        """Steps until the stage is done, pass by pass."""
        generation, running = _look(self.state, stage=stage, **self.static)
        for steps_left in reversed(range(stage.max_steps + 1)):
            self._keep(generation)
            yield self._snapshot(int(generation.nfe))
            if not steps_left or not (np.asarray(running) & wanted[self.rows]).any():
                return
            self.state = self.state.replace(finished=self.state.finished | ~wanted[self.rows])
            self._drop_finished()
            self._grow_for(stage)
            if hasattr(stage.stepper, "denoising"):
                yield from self._canvas(stage, wanted, int(generation.nfe))
            else:
                self.state = _one_step(self.network, self.state, self.sampling, stage=stage)
            if not wanted[self.rows].any():
                return
            generation, running = _look(self.state, stage=stage, **self.static)

    def _canvas(self, stage: Stage, wanted: np.ndarray, nfe: int) -> Iterator[Snapshot]:
        """A step of block diffusion, shown after each pass over its canvas."""
        start = np.asarray(self.state.filled - self.state.prompt_length)
        carry, done = _begin_canvas(self.network, self.state, stage=stage)
        for step in range(stage.stepper.sampler.denoising_steps):
            if done:
                break
            carry, done, tokens, confidence = _one_pass(self.network, self.state, carry, self.sampling, stage=stage)
            shown = self._snapshot(nfe + step + 1)
            for row, first, *canvas in zip(self.rows, start, np.asarray(tokens), np.asarray(confidence), strict=True):
                if not shown.finished[row]:
                    end = first + len(canvas[0])
                    for whole, part in zip((shown.tokens, shown.confidence), canvas, strict=True):
                        here = whole[row, max(first, 0) : end]
                        here[:] = part[max(-first, 0) :][: len(here)]
            yield shown
            if not wanted[self.rows].any():
                return
        self.state = _end_canvas(self.network, self.state, carry, stage=stage)

    def grow(self, size: int) -> None:
        """A cache with so many slots."""
        if size > self.size:
            self.size = size
            self.state = _taken(self.network, self.state, np.arange(len(self.rows)), slots=size)

    def _grow_for(self, stage: Stage) -> None:
        """A cache with slots for another step."""
        if self.size < self.slots and stage.cache_growth != 0:
            cached = 0 if stage.cache_growth is None else int(self.state.cache.length.max())
            self.grow(_size(cached, stage, self.slots))

    def _drop_finished(self) -> None:
        """Halves the batch, once or more, where the unfinished rows fit into the rest."""
        finished = np.asarray(self.state.finished)
        size = 1 << max(int((~finished).sum()) - 1, 0).bit_length()
        if size >= len(self.rows):
            return
        self._keep(_finish(self.state, **self.static))
        stay = np.argsort(finished, kind="stable")[:size]
        self.rows, self.state = self.rows[stay], _taken(self.network, self.state, stay, slots=self.size)
        self.sampling = jax.tree.map(lambda a: a[stay], self.sampling)

    def _keep(self, generation: Generation) -> None:
        """Takes note of what the rows in the batch have written."""
        for name in ("tokens", "length", "confidence", "writer"):
            new = getattr(generation, name)
            if new is not None:
                kept = self.written.setdefault(name, np.zeros((len(self.rows), *new.shape[1:]), new.dtype))
                kept[self.rows] = new

    def _snapshot(self, nfe: int) -> Snapshot:
        finished = np.ones(len(self.written["tokens"]), bool)
        finished[self.rows] = np.asarray(self.state.finished)
        written = {"confidence": None, "writer": None} | {name: a.copy() for name, a in self.written.items()}
        return Snapshot(**written, finished=finished, nfe=nfe)

    def generation(self) -> Generation:
        """All rows, those that left and those that stayed."""
        last = _finish(self.state, **self.static)
        if not self.drop_finished:
            return last
        self._keep(last)
        return last.replace(cache=None, **{name: jnp.asarray(a) for name, a in self.written.items()})


def _size(cached: int, stage: Stage, slots: int) -> int:
    """The least power of two that holds what is cached and one step more; at most all slots."""
    if stage.cache_growth is None:
        return slots
    return min(slots, max(_MIN_SLOTS, 1 << (cached + max(stage.cache_growth, 1) - 1).bit_length()))


@functools.partial(jax.jit, static_argnames=("sampler", "max_new_tokens"), donate_argnames=("cache",))
def _generate(network, cache, prompt, keys, *, sampler, max_new_tokens) -> Generation:
    """One program for the whole generation; the cache is written in place."""
    return sampler.generate(network, cache, prompt, keys, max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames=("sampler", "max_new_tokens"), donate_argnames=("cache",))
def _init(network, cache, prompt, keys, sampling, *, sampler, max_new_tokens):
    return with_sampling(sampler, sampling).init(network, cache, prompt, keys, max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames=("sampler", "max_new_tokens", "index"), donate_argnames=("cache",))
def _enter(network, cache, rest, *, sampler, max_new_tokens, index):
    return sampler.stages(max_new_tokens)[index].enter(network, rest.replace(cache=cache))


@functools.partial(jax.jit, static_argnames=("stage",), donate_argnames=("state",))
def _advance(network, state, max_cached, max_running, *, stage):
    """The state once at most `max_running` rows continue, or more than `max_cached` is cached; and which rows
    continue."""
    stepper = stage.stepper
    step = functools.partial(stepper.step, network)
    state, _ = decode_loop(step, stepper.done, state, stage.max_steps, max_running=max_running, max_cached=max_cached)
    return state, ~stepper.done(state)


@functools.partial(jax.jit, static_argnames=("stage",), donate_argnames=("state",))
def _one_step(network, state, sampling, *, stage):
    return with_sampling(stage.stepper, sampling).step(network, state)


@functools.partial(jax.jit, static_argnames=("stage",))
def _begin_canvas(network, state, *, stage):
    todo = stage.stepper.denoising(network, state)
    return todo.carry, jnp.all(todo.sampler.done(todo.carry[0]))


@functools.partial(jax.jit, static_argnames=("stage",))
def _one_pass(network, state, carry, sampling, *, stage):
    """The canvas after one more pass, whether it is done in all rows, and what it shows."""
    todo = with_sampling(stage.stepper, sampling).denoising(network, state)
    carry = todo.step(carry)
    return carry, jnp.all(todo.sampler.done(carry[0])), carry[0].tokens, carry[0].confidence


@functools.partial(jax.jit, static_argnames=("stage",), donate_argnames=("state",))
def _end_canvas(network, state, carry, *, stage):
    return stage.stepper.after_canvas(network, state, Denoised(carry[0], carry[1]))


@functools.partial(jax.jit, static_argnames=("stage", "sampler", "max_new_tokens"))
def _look(state, *, stage, sampler, max_new_tokens):
    """What is written, and which rows continue in the stage."""
    generation = sampler.finish(state, max_new_tokens=max_new_tokens)
    return generation.replace(cache=None, history=None), ~stage.stepper.done(state)


@functools.partial(jax.jit, static_argnames=("slots",))
def _taken(network, state, rows, *, slots):
    cache = network.resize(state.cache, rows, slots)
    rest = jax.tree.map(lambda a: jnp.take(a, rows, axis=0) if a.ndim else a, state.replace(cache=None))
    return rest.replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("sampler", "max_new_tokens"))
def _finish(state, *, sampler, max_new_tokens) -> Generation:
    return sampler.finish(state, max_new_tokens=max_new_tokens)
