"""Times samplers' steps on this machine: what samplers that adapt to their costs go by."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.build import LoadedModel
from diffusion_lm.samplers.auto import PassCosts
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt, TextSampler, decode_loop
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.speculative import Speculative

_STEPS, _REPEATS = 32, 7  # steps a timing, and timings, of which the median counts
_LARGE, _LARGE_STEPS, _LARGE_REPEATS = 30e6, 8, 3  # parameters: fewer steps then take long enough to be timed
_FEW_SLOTS = 64  # of a cache that takes next to no time to attend to


def break_even(model: LoadedModel, plain: AutoregressiveSampler, speculative: Speculative) -> float:
    """The time of a draft and its verification, in steps of `plain`, with a cache as long as the context."""
    steps, repeats = _counts(model)
    wide, plain = speculative.drafter.num_tokens + 1, dataclasses.replace(plain, eos=-1)
    drafts, length = dataclasses.replace(speculative, break_even=0.0, eos=-1), (steps + 1) * wide
    rounds, slots = steps // drafts.drafts_a_round, max(model.config.data.seq_len, length + 1)
    steps_s, drafts_s = _seconds(
        _timed(model, plain, rows=1, slots=slots, length=length, steps=steps),
        _timed(model, drafts, rows=1, slots=slots, length=length, steps=rounds),
        repeats=repeats,
    )
    return drafts_s / (rounds * drafts.drafts_a_round) * steps / steps_s


def pass_seconds(model: LoadedModel, widths: Sequence[int]) -> list[float]:
    """Seconds of a causal pass over so many new positions of one text, with a cache as long as the context."""
    steps, repeats = _counts(model)
    network, slots = model.for_sampling(1), max(model.config.data.seq_len, max(widths))

    @jax.jit
    def passed(network, tokens):
        def one(carry, _):
            head, _ = network.extend(cache, carry, jnp.full(1, carry.shape[1], jnp.int32), Causal())
            return jnp.minimum(carry, jnp.argmax(head.logits(), axis=-1).astype(jnp.int32)), None

        cache = network.empty_cache(1, slots)
        return jax.lax.scan(one, tokens, length=steps)[0]

    texts = [jnp.full((1, width), model.tokenizer.bos, jnp.int32) for width in widths]
    found = _seconds(*(_clocked(functools.partial(passed, network, text)) for text in texts), repeats=repeats)
    return [seconds / steps for seconds in found]


def pass_costs(model: LoadedModel, plain: AutoregressiveSampler, blocks: BlockDiffusion) -> PassCosts:
    """What `Auto` goes by; canvases are timed after half a context."""
    context, wide = model.config.data.seq_len, blocks.canvas_length
    few, half = max(_FEW_SLOTS, 2 * _STEPS), max(context // 2, wide + 1, 2 * _STEPS)
    plain = dataclasses.replace(plain, eos=-1)
    steps = min(blocks.sampler.denoising_steps, 2)
    canvas = dataclasses.replace(
        blocks, sampler=dataclasses.replace(blocks.sampler, denoising_steps=steps, eos=-1), eos=-1
    )
    common = {"length": 2 * _STEPS - 1, "steps": _STEPS}
    short, long, narrow, whole = _seconds(
        _timed(model, plain, rows=1, slots=few, **common),
        _timed(model, plain, rows=1, slots=max(context, few), **common),
        _timed(model, plain, rows=wide, slots=half, **common),
        _timed(model, canvas, rows=wide, slots=half, length=wide, steps=1),
    )
    return PassCosts(
        step_s=short / _STEPS,
        slot_s=max(long - short, 0.0) / _STEPS / max(context - few, 1),
        narrow_s=narrow / _STEPS,
        canvas_s=whole / steps,
    )


def _counts(model: LoadedModel) -> tuple[int, int]:
    """Steps of a timing, and timings."""
    large = sum(leaf.size for leaf in jax.tree.leaves(model.network.params)) > _LARGE
    return (_LARGE_STEPS, _LARGE_REPEATS) if large else (_STEPS, _REPEATS)


def _seconds(*timed: Callable[[], float], repeats: int = _REPEATS) -> list[float]:
    """The median of several timings of each, taken in turn, so that a busy moment slows none more than others."""
    found = [[seconds() for seconds in timed] for _ in range(repeats)]
    return [statistics.median(one) for one in zip(*found, strict=True)]


def _timed(
    model: LoadedModel, sampler: TextSampler, *, rows: int, slots: int, length: int, steps: int
) -> Callable[[], float]:
    """A call returns the seconds of so many first steps, with the network prepared for so many rows of activations."""
    network, (first, *_) = model.for_sampling(rows), sampler.stages(length)
    prompt = Prompt(tokens=jnp.full((1, 1), model.tokenizer.bos, jnp.int32), length=jnp.ones(1, jnp.int32))
    keys = jax.random.split(jax.random.key(0), 1)

    # The network is an argument, as in generation: as a constant of the program its weights get another layout.
    @jax.jit
    def stepped(network, state):
        step = functools.partial(first.stepper.step, network)
        return decode_loop(step, first.stepper.done, state, steps)[0].finished

    init = jax.jit(lambda network, cache: sampler.init(network, cache, prompt, keys, max_new_tokens=length))
    state = init(network, network.empty_cache(1, slots))
    return _clocked(functools.partial(stepped, network, state))


def _clocked(call: Callable) -> Callable[[], float]:
    """Seconds of each further call; one compiles."""
    jax.block_until_ready(call())

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return seconds
