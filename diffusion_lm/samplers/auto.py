"""The faster of canvases and token by token, or one after the other in one cache."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import AUTOREGRESSION, DIFFUSION, CachedDenoiser, Generation, Prompt, Stage, TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion, BlockState
from diffusion_lm.samplers.speculative import Speculative, SpeculativeState

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassCosts:
    """Seconds of a causal forward pass, batch 1.

    step_s    over one token, with the network prepared for `Auto.speculative`, and an empty cache
    slot_s    what each slot of the cache adds
    narrow_s  over one token, with the network prepared for canvases
    canvas_s  the same over a whole canvas; widths in between are interpolated linearly
    """

    step_s: float
    slot_s: float = 0.0
    narrow_s: float
    canvas_s: float

    def __post_init__(self):
        if min(self.step_s, self.narrow_s, self.canvas_s) <= 0 or self.slot_s < 0:
            raise ValueError(f"forward passes take more than 0 s; got {self}")


class Plan(NamedTuple):
    """So many whole canvases first, and the rest by a narrower canvas, or else token by token."""

    canvases: int
    narrow: bool


_STEPS = Plan(canvases=0, narrow=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(TextSampler):
    """Takes the cheapest plan by the measured costs of passes: all tokens by `speculative`, or canvases, and a narrower
    canvas or `speculative` for the rest.

    block_diffusion  with align 1: the network is also autoregressive, over the same cache
    """

    block_diffusion: BlockDiffusion
    speculative: Speculative
    costs: PassCosts

    def __post_init__(self):
        if self.block_diffusion.align != 1 or self.block_diffusion.record:
            raise ValueError("auto needs canvases over a causal cache (align=1) that aren't recorded")

    @property
    def canvas_length(self) -> int:
        return self.block_diffusion.canvas_length

    def plan(self, max_new_tokens: int) -> Plan:
        """How so many tokens are generated soonest."""
        (whole, rest), cost = divmod(max_new_tokens, self.canvas_length), self.costs
        # a canvas, and the pass that appends it to the cache
        canvases_s = whole * (self._canvas_s(self.canvas_length) + cost.canvas_s)
        plans = {
            Plan(whole, narrow=True): canvases_s + self._canvas_s(rest),
            Plan(whole, narrow=False): canvases_s + rest * cost.narrow_s,
            _STEPS: max_new_tokens * (cost.step_s + max_new_tokens * cost.slot_s),
        }
        return min(plans, key=plans.get)

    def _canvas_s(self, width: int) -> float:
        """Seconds of denoising a canvas so wide: a step commits one position or more."""
        slope = (self.costs.canvas_s - self.costs.narrow_s) / max(self.canvas_length - 1, 1)
        steps = min(self.block_diffusion.sampler.denoising_steps, width)
        return steps * (self.costs.narrow_s + slope * (width - 1))

    def width(self, max_new_tokens: int) -> int:
        return 1 if self.plan(max_new_tokens) == _STEPS else self.canvas_length

    def init(self, network: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, max_new_tokens: int) -> Any:
        first = self.speculative if self.plan(max_new_tokens) == _STEPS else self.block_diffusion
        return first.init(network, cache, prompt, keys, max_new_tokens=max_new_tokens)

    def stages(self, max_new_tokens: int) -> tuple[Stage, ...]:
        plan = self.plan(max_new_tokens)
        if plan.narrow:
            return self.block_diffusion.stages(max_new_tokens)
        (rest,) = self.speculative.stages(max_new_tokens)
        if plan == _STEPS:
            return (rest,)
        return self.block_diffusion.stages(max_new_tokens)[0], dataclasses.replace(rest, enter=self._token_by_token)

    def finish(self, state: Any, *, max_new_tokens: int) -> Generation:
        last = self.block_diffusion if isinstance(state, BlockState) else self.speculative
        return last.finish(state, max_new_tokens=max_new_tokens)

    def _token_by_token(self, network: CachedDenoiser, state: BlockState) -> SpeculativeState:
        going, at = ~state.finished, jnp.arange(state.text.shape[1], dtype=jnp.int32)[None]
        writer = jnp.where(at < state.filled[:, None], DIFFUSION, AUTOREGRESSION)
        return self.speculative.from_text(
            text=state.text,
            confidence=state.confidence,
            writer=writer.astype(jnp.int8),
            filled=state.filled,
            prompt_length=state.prompt_length,
            finished=state.finished,
            keys=state.keys,
            nfe=state.nfe,
            cache=network.truncate(state.cache, going.astype(jnp.int32)),  # the next step appends the last token
        )
