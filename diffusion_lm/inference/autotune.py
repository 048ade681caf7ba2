"""What writers' steps take on this machine, at this moment: what those choose by that adapt to it."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_lm.build import LoadedModel
from diffusion_lm.samplers.auto import PassCosts
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt, TextSampler, decode_loop
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.speculative import Speculative

_STEPS, _ROUNDS = 32, 7  # steps a timing, and timings, of which the median counts
_FEW_SLOTS = 64  # of a cache that takes next to nothing to read


def break_even(model: LoadedModel, plain: AutoregressiveSampler, drafts: Speculative) -> float:
    """What a cycle of `drafts` (draft and check) takes, in steps of `plain`, with a cache as long as the context."""
    wide, plain = drafts.drafter.width + 1, dataclasses.replace(plain, eos=-1)
    tireless, length = dataclasses.replace(drafts, break_even=0.0, eos=-1), (_STEPS + 1) * wide
    turns, slots = _STEPS // tireless.cycles, max(model.config.data.seq_len, length + 1)
    steps_s, cycles_s = _seconds(
        _timed(model, plain, rows=1, slots=slots, length=length, steps=_STEPS),
        _timed(model, tireless, rows=1, slots=slots, length=length, steps=turns),
    )
    return cycles_s / (turns * tireless.cycles) * _STEPS / steps_s


def measured(model: LoadedModel, plain: AutoregressiveSampler, canvases: BlockDiffusion) -> PassCosts:
    """What `Auto` asks; canvases are cleared behind half a context."""
    context, wide = model.config.data.seq_len, canvases.canvas
    few, half = max(_FEW_SLOTS, 2 * _STEPS), max(context // 2, wide + 1, 2 * _STEPS)
    plain = dataclasses.replace(plain, eos=-1)
    sampler = dataclasses.replace(canvases.sampler, passes=min(canvases.sampler.passes, 2), eos=-1)
    canvas = dataclasses.replace(canvases, sampler=sampler, eos=-1)
    asked = {"length": 2 * _STEPS - 1, "steps": _STEPS}
    short, long, narrow, whole = _seconds(
        _timed(model, plain, rows=1, slots=few, **asked),
        _timed(model, plain, rows=1, slots=max(context, few), **asked),
        _timed(model, plain, rows=wide, slots=half, **asked),
        _timed(model, canvas, rows=wide, slots=half, length=wide, steps=1),
    )
    return PassCosts(
        step_s=short / _STEPS,
        slot_s=max(long - short, 0.0) / _STEPS / max(context - few, 1),
        narrow_s=narrow / _STEPS,
        canvas_s=whole / sampler.passes,
    )


def _seconds(*timed: Callable[[], float]) -> list[float]:
    """Of each the median of several, taken in turn: a busy moment then makes no one look dear."""
    rounds = [[seconds() for seconds in timed] for _ in range(_ROUNDS)]
    return [statistics.median(one) for one in zip(*rounds, strict=True)]


def _timed(
    model: LoadedModel, writer: TextSampler, *, rows: int, slots: int, length: int, steps: int
) -> Callable[[], float]:
    """A call says how long so many of the writer's first steps take, with the network as it suits so many rows."""
    bound, (first, *_) = model.for_sampling(rows), writer.phases(length)
    prompt = Prompt(tokens=jnp.full((1, 1), model.tokenizer.bos, jnp.int32), length=jnp.ones(1, jnp.int32))
    keys = jax.random.split(jax.random.key(0), 1)
    # The network is handed over, as it is in writing: as a part of the program its weights would be laid out otherwise.
    begin = jax.jit(lambda bound, cache: writer.begin(bound, cache, prompt, keys, length=length))
    stepped = jax.jit(lambda bound, state: decode_loop(first.sampler, bound, state, steps)[0].finished)
    state = begin(bound, bound.empty_cache(1, slots))
    jax.block_until_ready(stepped(bound, state))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(stepped(bound, state))
        return time.perf_counter() - start

    return seconds
