"""One writer that takes whichever way is faster: whole canvases, then token by token, in one cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.samplers import canvases, speculative
from diffusion_lm.samplers.base import Generation, Model, Phase, Prompt, Writer
from diffusion_lm.samplers.canvases import Canvases
from diffusion_lm.samplers.speculative import Speculative

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Writer):
    """Chooses by measured cost: whole canvases if they beat writing the same tokens one by one, and for what is left a
    narrower canvas or `tail`.

    canvases  with align 1: a network that also reads causally, over the same cache
    step_s    seconds of one causal pass over one token
    canvas_s  seconds of one pass over a whole canvas
    """

    canvases: Canvases
    tail: Speculative
    step_s: float
    canvas_s: float

    def __post_init__(self):
        if self.canvases.align != 1 or self.canvases.record:
            raise ValueError("auto needs canvases over a causal cache (align=1) that aren't recorded")
        if not (self.step_s > 0 and self.canvas_s > 0):
            raise ValueError(f"auto needs costs above 0 s, not step_s={self.step_s}, canvas_s={self.canvas_s}")

    @property
    def canvas(self) -> int:
        return self.canvases.canvas

    def plan(self, length: int) -> int:
        """How many canvases to write first."""
        canvas_s = (self.canvases.sampler.passes + 1) * self.canvas_s  # and the pass that reads it into the cache
        return length // self.canvas if canvas_s < self.canvas * self.step_s else 0

    def _last_too(self, rest: int) -> bool:
        """Whether a last, narrower canvas, which costs no more than a whole one, beats writing `rest` one by one."""
        return not rest or self.canvases.sampler.passes * self.canvas_s < rest * self.step_s

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have."""
        return self.tail.slots(prompt, length)

    def begin(self, model: Model, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> Any:
        first = self.canvases if self.plan(length) else self.tail
        return first.begin(model, cache, prompt, keys, length=length)

    def phases(self, length: int) -> tuple[Phase, ...]:
        first = self.plan(length)
        if first and self._last_too(length - first * self.canvas):
            return self.canvases.phases(length)
        (tail,) = self.tail.phases(length)
        if not first:
            return (tail,)
        return self.canvases.phases(length)[0], dataclasses.replace(tail, enter=self._token_by_token)

    def answer(self, state: Any, *, length: int) -> Generation:
        way = self.canvases if isinstance(state, canvases.Writing) else self.tail
        return way.answer(state, length=length)

    def _token_by_token(self, model: Model, written: canvases.Writing) -> speculative.Writing:
        going = ~written.finished
        return self.tail.from_text(
            text=written.text,
            filled=written.filled,
            prompt=written.prompt,
            finished=written.finished,
            keys=written.keys,
            nfe=written.nfe,
            cache=model.rewind(written.cache, going.astype(jnp.int32)),  # the last token is read by the next step
        )
