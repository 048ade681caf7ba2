"""Autoregressive writing: one token a pass, with the exact cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import Generation, Model, Phase, Prompt, Writer, row_keys
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.types import Causal

Array = jax.Array


@struct.dataclass
class Writing:
    """text int32 [B, N], nfe int32 [] (passes made, and columns of text written), finished bool [B], keys [B], the
    cache (which has not read the last column yet)."""

    text: Array
    nfe: Array
    finished: Array
    keys: Array
    cache: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(Writer):
    """Draws each token from the next-token distribution. mask fills what is not written; eot ends a row."""

    mask: int
    eot: int
    draw: Draw = dataclasses.field(default_factory=Draw)

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have."""
        return prompt + length

    def begin(self, model: Model, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> Writing:
        """One pass reads the prompts and says their next tokens."""
        readout, cache = model.extend(cache, prompt.tokens, prompt.length, Causal())
        state = Writing(
            text=jnp.full((prompt.tokens.shape[0], length), self.mask, jnp.int32),
            nfe=jnp.zeros((), jnp.int32),
            finished=jnp.zeros(prompt.tokens.shape[0], bool),
            keys=keys,
            cache=cache,
        )
        return self._write(state, readout.pick(prompt.length[:, None] - 1).logits()[:, 0])

    def phases(self, length: int) -> tuple[Phase, ...]:
        return (Phase(sampler=self, steps=length - 1, reads=1),)

    def answer(self, state: Writing, *, length: int) -> Generation:
        written = state.text != self.mask
        ended = (state.text == self.eot) | ~written
        return Generation(
            tokens=jnp.where(ended, self.mask, state.text),
            length=jnp.sum(~ended, axis=1, dtype=jnp.int32),
            nfe=state.nfe,
            cache=state.cache,
        )

    def step(self, model: Model, state: Writing) -> Writing:
        last = jax.lax.dynamic_index_in_dim(state.text, state.nfe - 1, axis=1)
        count = jnp.where(state.finished, 0, 1)
        readout, cache = model.extend(state.cache, jnp.where(state.finished[:, None], 0, last), count, Causal())
        return self._write(state.replace(cache=cache), readout.logits()[:, 0])

    def done(self, state: Writing) -> Array:
        return state.finished | (state.nfe >= state.text.shape[1])

    def _write(self, state: Writing, logits: Array) -> Writing:
        tokens, _ = self.draw(row_keys(state.keys, state.nfe), logits)
        tokens = jnp.where(state.finished, self.mask, tokens)
        text = jax.lax.dynamic_update_slice(state.text, tokens[:, None], (0, state.nfe))
        return state.replace(text=text, nfe=state.nfe + 1, finished=state.finished | (tokens == self.eot))
