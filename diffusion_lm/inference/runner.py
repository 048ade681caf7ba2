"""Runs a text sampler: as one program or, where that saves time, as programs that stop between steps while the cache
grows or finished rows leave the batch."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.samplers.base import Generation, Prompt, Stage, TextSampler, decode_loop

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
    size = _size(width, stages[0], slots)
    state = _init(network, network.empty_cache(rows, size), prompt, keys, **static)
    batch = _Batch(sampler, network, state, size, slots, max_new_tokens, drop_finished)
    for index, stage in enumerate(stages):
        if stage.enter:
            batch.grow(_size(width, stage, slots))
            rest, cache = batch.state.replace(cache=None), batch.state.cache
            batch.state = _enter(network, cache, rest, index=index, **static)
        batch.run(stage)
    return batch.generation()


def _say_what_compiles(network: Any, prompt: Prompt, options: tuple) -> None:
    """One line before the first generation of its shapes and options, which waits for its programs."""
    shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves((network, prompt)))
    if (asked := (jax.tree.structure((network, prompt)), shapes, options)) not in _asked:
        _asked.add(asked)
        log.info("compiling for %d rows and prompts of up to %d tokens: this happens once", *prompt.tokens.shape)


class _Batch:
    """The rows still in the batch, their state, and the tokens of rows that left."""

    def __init__(self, sampler, network, state, size: int, slots: int, max_new_tokens: int, drop_finished: bool):
        self.sampler, self.network, self.state, self.max_new_tokens = sampler, network, state, max_new_tokens
        self.size, self.slots, self.drop_finished = size, slots, drop_finished
        self.rows = np.arange(len(state.finished))
        self.tokens = np.zeros((len(self.rows), max_new_tokens), np.int32)
        self.count = np.zeros(len(self.rows), np.int32)

    def run(self, stage: Stage) -> None:
        """Steps until the stage is done."""
        plain = Stage(stepper=stage.stepper, max_steps=stage.max_steps)  # a bound `enter` would always compile anew
        running = np.ones(1, bool)
        while running.any():
            if self.size < self.slots and stage.cache_growth != 0:
                cached = 0 if stage.cache_growth is None else int(self.state.cache.length.max())
                self.grow(_size(cached, stage, self.slots))
            # the most that may be cached where another step begins; the cache grows until one fits
            max_cached = self.slots if self.size == self.slots else self.size - stage.cache_growth
            max_running = len(self.rows) // 2 if self.drop_finished else 0
            self.state, running = _advance(self.network, self.state, max_cached, max_running, stage=plain)
            running = np.asarray(running)
            if self.drop_finished and running.any():
                self._drop_finished()

    def grow(self, size: int) -> None:
        """A cache with so many slots."""
        if size > self.size:
            self.size = size
            self.state = _taken(self.network, self.state, np.arange(len(self.rows)), slots=size)

    def _drop_finished(self) -> None:
        """Halves the batch, once or more, where the unfinished rows fit into the rest."""
        finished = np.asarray(self.state.finished)
        size = 1 << max(int((~finished).sum()) - 1, 0).bit_length()
        if size >= len(self.rows):
            return
        self._keep_tokens()
        stay = np.argsort(finished, kind="stable")[:size]
        self.rows, self.state = self.rows[stay], _taken(self.network, self.state, stay, slots=self.size)

    def _keep_tokens(self) -> Generation:
        generation = _finish(self.state, sampler=self.sampler, max_new_tokens=self.max_new_tokens)
        self.tokens[self.rows], self.count[self.rows] = generation.tokens, generation.length
        return generation

    def generation(self) -> Generation:
        """All rows, those that left and those that stayed."""
        last = self._keep_tokens()
        if not self.drop_finished:
            return last
        return last.replace(tokens=jnp.asarray(self.tokens), length=jnp.asarray(self.count), cache=None)


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
def _init(network, cache, prompt, keys, *, sampler, max_new_tokens):
    return sampler.init(network, cache, prompt, keys, max_new_tokens=max_new_tokens)


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


@functools.partial(jax.jit, static_argnames=("slots",))
def _taken(network, state, rows, *, slots):
    cache = network.resize(state.cache, rows, slots)
    rest = jax.tree.map(lambda a: jnp.take(a, rows, axis=0) if a.ndim else a, state.replace(cache=None))
    return rest.replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("sampler", "max_new_tokens"))
def _finish(state, *, sampler, max_new_tokens) -> Generation:
    return sampler.finish(state, max_new_tokens=max_new_tokens)
