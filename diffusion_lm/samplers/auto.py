"""One writer that takes whichever way is faster: canvases, token by token, or one after the other in one cache."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.samplers import block_diffusion, speculative
from diffusion_lm.samplers.base import CachedDenoiser, Generation, Prompt, Stage, TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.speculative import Speculative

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassCosts:
    """Seconds of a causal pass, batch 1.

    step_s    over one token, with the network as it is best for `Auto.tail` and an empty cache
    slot_s    what each slot of the cache adds to that
    narrow_s  over one token, with the network as it is best for canvases
    canvas_s  the same over a whole canvas; widths in between are taken to lie on the line
    """

    step_s: float
    slot_s: float = 0.0
    narrow_s: float
    canvas_s: float

    def __post_init__(self):
        if min(self.step_s, self.narrow_s, self.canvas_s) <= 0 or self.slot_s < 0:
            raise ValueError(f"passes take more than 0 s, not {self}")


class Plan(NamedTuple):
    """So many whole canvases first, and what is left by a narrower canvas, or else token by token."""

    canvases: int
    narrow: bool


_STEPS = Plan(canvases=0, narrow=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(TextSampler):
    """Takes the plan of the least cost by what passes were measured to take: all of it by `tail`, or canvases, and for
    what is left a narrower canvas or `tail`.

    canvases  with align 1: a network that also reads causally, over the same cache
    """

    canvases: BlockDiffusion
    tail: Speculative
    costs: PassCosts

    def __post_init__(self):
        if self.canvases.align != 1 or self.canvases.record:
            raise ValueError("auto needs canvases over a causal cache (align=1) that aren't recorded")

    @property
    def canvas(self) -> int:
        return self.canvases.canvas

    def plan(self, length: int) -> Plan:
        """How so many tokens are written soonest."""
        (whole, rest), cost = divmod(length, self.canvas), self.costs
        canvases_s = whole * (self._cleared_s(self.canvas) + cost.canvas_s)  # and the pass that reads it into the cache
        plans = {
            Plan(whole, narrow=True): canvases_s + self._cleared_s(rest),
            Plan(whole, narrow=False): canvases_s + rest * cost.narrow_s,
            _STEPS: length * (cost.step_s + length * cost.slot_s),
        }
        return min(plans, key=plans.get)

    def _cleared_s(self, width: int) -> float:
        """Of clearing a canvas so wide: a pass writes one position or more."""
        slope = (self.costs.canvas_s - self.costs.narrow_s) / max(self.canvas - 1, 1)
        return min(self.canvases.sampler.passes, width) * (self.costs.narrow_s + slope * (width - 1))

    def width(self, length: int) -> int:
        """Positions of a row that a pass reads at once."""
        return 1 if self.plan(length) == _STEPS else self.canvas

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have."""
        return self.tail.slots(prompt, length)

    def begin(self, model: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> Any:
        first = self.tail if self.plan(length) == _STEPS else self.canvases
        return first.begin(model, cache, prompt, keys, length=length)

    def phases(self, length: int) -> tuple[Stage, ...]:
        plan = self.plan(length)
        if plan.narrow:
            return self.canvases.phases(length)
        (tail,) = self.tail.phases(length)
        if plan == _STEPS:
            return (tail,)
        return self.canvases.phases(length)[0], dataclasses.replace(tail, enter=self._token_by_token)

    def answer(self, state: Any, *, length: int) -> Generation:
        way = self.canvases if isinstance(state, block_diffusion.BlockState) else self.tail
        return way.answer(state, length=length)

    def _token_by_token(
        self, model: CachedDenoiser, written: block_diffusion.BlockState
    ) -> speculative.SpeculativeState:
        going = ~written.finished
        return self.tail.from_text(
            text=written.text,
            filled=written.filled,
            prompt=written.prompt,
            finished=written.finished,
            keys=written.keys,
            nfe=written.nfe,
            cache=model.truncate(written.cache, going.astype(jnp.int32)),  # the last token is read by the next step
        )
