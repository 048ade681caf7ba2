"""What a network's passes take on this machine, at this moment: what writers choose by that adapt to it."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.build import Model
from diffusion_lm.samplers.auto import Costs
from diffusion_lm.samplers.base import run
from diffusion_lm.samplers.drafts import Drafter
from diffusion_lm.types import Causal

_TIMED, _ROUNDS = 16, 12  # narrow passes a timing (of canvases 2), and timings, of which the median counts
_FEW_SLOTS = 64  # of a cache that takes next to nothing to read


def break_even(model: Model, drafter: Drafter) -> float:
    """What a cycle takes, in plain steps: a check, and as long for each pass of the drafter."""
    wide = drafter.width + 1
    slots = max(model.config.data.length, wide)
    step_s, check_s = _seconds(model, _Pass(width=1, rows=1, slots=slots), _Pass(width=wide, rows=wide, slots=slots))
    return (1 + drafter.passes) * check_s / step_s


def measured(model: Model, canvas: int) -> Costs:
    """What `Auto` asks. Compiles and runs four passes, canvases behind half a context."""
    context = model.config.data.length
    few, half = min(_FEW_SLOTS, context), max(context // 2, canvas)
    short_s, long_s, narrow_s, canvas_s = _seconds(
        model,
        _Pass(width=1, rows=1, slots=few),
        _Pass(width=1, rows=1, slots=context),
        _Pass(width=1, rows=canvas, slots=half),
        _Pass(width=canvas, rows=canvas, slots=half),
    )
    slot_s = max(long_s - short_s, 0.0) / max(context - few, 1)
    return Costs(step_s=short_s, slot_s=slot_s, narrow_s=narrow_s, canvas_s=canvas_s)


class _Pass(NamedTuple):
    """A causal pass over `width` tokens with a cache of `slots`, and the network as it suits so many `rows`."""

    width: int
    rows: int
    slots: int


def _seconds(model: Model, *asked: _Pass) -> list[float]:
    """Of each the median of several, taken in turn: a busy moment then makes no one look dear."""
    timed = [_timed(model, one) for one in asked]
    rounds = [[passes() for passes in timed] for _ in range(_ROUNDS)]
    return [statistics.median(seconds[i] for seconds in rounds) for i in range(len(asked))]


def _timed(model: Model, one: _Pass) -> Callable[[], float]:
    bound, count = model.for_sampling(one.rows), _TIMED if one.width <= _TIMED else 2
    passes = jax.jit(lambda state: run(_Again(), bound, state, count)[0])
    state = bound.empty_cache(1, one.slots), jnp.zeros((1, one.width), jnp.int32)
    jax.block_until_ready(passes(state))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(passes(state))
        return (time.perf_counter() - start) / count

    return seconds


class _Again:
    """Pass after pass over the same slots."""

    def step(self, bound, state):
        cache, tokens = state
        readout, cache = bound.extend(cache, tokens, jnp.zeros(1, jnp.int32), Causal())
        return cache, jnp.argmax(readout.logits(), axis=-1).astype(jnp.int32)

    def done(self, state):
        return jnp.zeros(1, bool)
