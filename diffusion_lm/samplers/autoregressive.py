"""Autoregressive writing: one token a pass, with the exact cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.samplers.base import CachedDenoiser, Generation, Prompt, Stage, TextSampler, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams

Array = jax.Array


@struct.dataclass
class ARState:
    """text int32 [B, N], nfe int32 [] (passes made, and columns of text written), finished bool [B], keys [B], the
    cache (which has not read the last column yet)."""

    text: Array
    nfe: Array
    finished: Array
    keys: Array
    cache: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler(TextSampler):
    """Draws each token from the next-token distribution. mask fills what is not written; eos ends a row."""

    mask: int
    eos: int
    draw: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have."""
        return prompt + length

    def begin(self, model: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> ARState:
        """One pass reads the prompts and says their next tokens."""
        head, cache = model.extend(cache, prompt.tokens, prompt.length, Causal())
        state = ARState(
            text=jnp.full((prompt.tokens.shape[0], length), self.mask, jnp.int32),
            nfe=jnp.zeros((), jnp.int32),
            finished=jnp.zeros(prompt.tokens.shape[0], bool),
            keys=keys,
            cache=cache,
        )
        return self._write(state, head.gather(prompt.length[:, None] - 1).logits()[:, 0])

    def phases(self, length: int) -> tuple[Stage, ...]:
        return (Stage(sampler=self, steps=length - 1, reads=1),)

    def answer(self, state: ARState, *, length: int) -> Generation:
        written = state.text != self.mask
        ended = (state.text == self.eos) | ~written
        return Generation(
            tokens=jnp.where(ended, self.mask, state.text),
            length=jnp.sum(~ended, axis=1, dtype=jnp.int32),
            nfe=state.nfe,
            cache=state.cache,
        )

    def step(self, model: CachedDenoiser, state: ARState) -> ARState:
        last = jax.lax.dynamic_index_in_dim(state.text, state.nfe - 1, axis=1)
        count = jnp.where(state.finished, 0, 1)
        head, cache = model.extend(state.cache, jnp.where(state.finished[:, None], 0, last), count, Causal())
        return self._write(state.replace(cache=cache), head.logits()[:, 0])

    def done(self, state: ARState) -> Array:
        return state.finished | (state.nfe >= state.text.shape[1])

    def _write(self, state: ARState, logits: Array) -> ARState:
        tokens, _ = self.draw(fold_in_rows(state.keys, state.nfe), logits)
        tokens = jnp.where(state.finished, self.mask, tokens)
        text = jax.lax.dynamic_update_slice(state.text, tokens[:, None], (0, state.nfe))
        return state.replace(text=text, nfe=state.nfe + 1, finished=state.finished | (tokens == self.eos))
