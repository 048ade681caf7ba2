"""Autoregressive writing: one token a pass, with the exact cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import Generation, Model, Prompt, row_keys, run
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.types import Causal

Array = jax.Array


@struct.dataclass
class Writing:
    """text int32 [B, N] written so far, count int32 [] columns of it, finished bool [B], keys [B], the cache (which
    has not read the last column yet)."""

    text: Array
    count: Array
    finished: Array
    keys: Array
    cache: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Draws each token from the next-token distribution. mask fills what is not written; eot ends a row."""

    mask: int
    eot: int
    draw: Draw = dataclasses.field(default_factory=Draw)

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have."""
        return prompt + length

    def generate(self, model: Model, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> Generation:
        """Writes at most `length` tokens behind each prompt. One pass reads the prompts, each further one a token."""
        readout, cache = model.extend(cache, prompt.tokens, prompt.length, Causal())
        state = Writing(
            text=jnp.full((prompt.tokens.shape[0], length), self.mask, jnp.int32),
            count=jnp.zeros((), jnp.int32),
            finished=jnp.zeros(prompt.tokens.shape[0], bool),
            keys=keys,
            cache=cache,
        )
        state = self._write(state, readout.pick(prompt.length - 1).logits()[:, 0])
        state, _ = run(self, model, state, length - 1)
        written = state.text != self.mask
        ended = (state.text == self.eot) | ~written
        return Generation(
            tokens=jnp.where(ended, self.mask, state.text),
            length=jnp.sum(~ended, axis=1, dtype=jnp.int32),
            nfe=state.count,
            cache=state.cache,
        )

    def step(self, model: Model, state: Writing) -> Writing:
        last = jax.lax.dynamic_index_in_dim(state.text, state.count - 1, axis=1)
        count = jnp.where(state.finished, 0, 1)
        readout, cache = model.extend(state.cache, jnp.where(state.finished[:, None], 0, last), count, Causal())
        return self._write(state.replace(cache=cache), readout.logits()[:, 0])

    def done(self, state: Writing) -> Array:
        return state.finished

    def _write(self, state: Writing, logits: Array) -> Writing:
        tokens, _ = self.draw(row_keys(state.keys, state.count), logits)
        tokens = jnp.where(state.finished, self.mask, tokens)
        text = jax.lax.dynamic_update_slice(state.text, tokens[:, None], (0, state.count))
        return state.replace(text=text, count=state.count + 1, finished=state.finished | (tokens == self.eot))
