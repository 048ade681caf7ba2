"""Autoregressive sampling: one token a forward pass, with the exact cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.samplers.base import (
    AUTOREGRESSION,
    CachedDenoiser,
    Generation,
    Prompt,
    Stage,
    TextSampler,
    fold_in_rows,
    generation_of,
)
from diffusion_lm.samplers.logits_processors import LogitsProcessor
from diffusion_lm.samplers.sampling_params import SamplingParams, suppress

Array = jax.Array


@struct.dataclass
class ARState:
    """text int32 [B, N], confidence float32 [B, N] (its probabilities), nfe int32 [] (forward passes, and columns
    written), finished bool [B], keys [B], and the cache (without the last column)."""

    text: Array
    confidence: Array
    nfe: Array
    finished: Array
    keys: Array
    cache: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler(TextSampler):
    """Samples each token from the next-token distribution. mask fills unwritten columns; eos ends a row, and so do
    stops. logits_processor is a rule of the sampler's own, which `inference.pipeline` applies."""

    mask: int
    eos: int
    stops: tuple[int, ...] = ()
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    logits_processor: LogitsProcessor | None = None

    def init(self, network: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, max_new_tokens: int) -> ARState:
        """One forward pass over the prompts predicts their next tokens."""
        head, cache = network.extend(cache, prompt.tokens, prompt.length, Causal())
        rows = prompt.tokens.shape[0]
        state = ARState(
            text=jnp.full((rows, max_new_tokens), self.mask, jnp.int32),
            confidence=jnp.zeros((rows, max_new_tokens)),
            nfe=jnp.zeros((), jnp.int32),
            finished=jnp.zeros(rows, bool),
            keys=keys,
            cache=cache,
        )
        return self._write(state, head.gather(prompt.length[:, None] - 1).logits()[:, 0])

    def stages(self, max_new_tokens: int) -> tuple[Stage, ...]:
        return (Stage(stepper=self, max_steps=max_new_tokens - 1, cache_growth=1),)

    def step(self, network: CachedDenoiser, state: ARState) -> ARState:
        last = jax.lax.dynamic_index_in_dim(state.text, state.nfe - 1, axis=1)
        count = jnp.where(state.finished, 0, 1)
        head, cache = network.extend(state.cache, jnp.where(state.finished[:, None], 0, last), count, Causal())
        return self._write(state.replace(cache=cache), head.logits()[:, 0])

    def done(self, state: ARState) -> Array:
        return state.finished | (state.nfe >= state.text.shape[1])

    def finish(self, state: ARState, *, max_new_tokens: int) -> Generation:
        ended, writer = self._ends(state.text) | (state.text == self.mask), jnp.full(state.text.shape, AUTOREGRESSION)
        more = {"confidence": state.confidence, "writer": writer.astype(jnp.int8)}
        return generation_of(state, state.text, ended, self.mask, **more)

    def _ends(self, tokens: Array) -> Array:
        """bool, as tokens: where an id ends a row."""
        return functools.reduce(jnp.logical_or, [tokens == stop for stop in self.stops], tokens == self.eos)

    def _write(self, state: ARState, logits: Array) -> ARState:
        tokens, confidence = self.sampling.next_token(
            fold_in_rows(state.keys, state.nfe), suppress(logits, (self.mask,))
        )
        tokens = jnp.where(state.finished, self.mask, tokens)
        text = jax.lax.dynamic_update_slice(state.text, tokens[:, None], (0, state.nfe))
        confidence = jax.lax.dynamic_update_slice(state.confidence, confidence[:, None], (0, state.nfe))
        finished = state.finished | self._ends(tokens)
        return state.replace(text=text, confidence=confidence, nfe=state.nfe + 1, finished=finished)
