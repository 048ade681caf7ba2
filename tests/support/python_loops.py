"""Text samplers with their loops in Python: runs of many samplers share the few programs of a network's passes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.inference import pipeline
from diffusion_lm.samplers import base
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.approximate_cache import ApproximateCacheSampler
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.editing import Editing
from diffusion_lm.samplers.processed_denoiser import ProcessedDenoiser


@pytest.fixture
def loops_in_python(monkeypatch):
    def decode_loop(step, done, state, max_steps, record=None):
        for _ in range(max_steps):
            if np.all(done(state)):
                break
            state = step(state)
        return state, None

    monkeypatch.setattr(base, "decode_loop", decode_loop)
    monkeypatch.setattr(jax.lax, "cond", lambda chosen, one, other, *inputs: (one if chosen else other)(*inputs))
    monkeypatch.setattr(jax.lax, "switch", lambda index, branches, *inputs: branches[int(index)](*inputs))
    for sampler in (Ancestral, ApproximateCacheSampler, Confidence, Editing):
        monkeypatch.setattr(sampler, "update", jax.jit(sampler.update, static_argnums=0))


@dataclasses.dataclass(frozen=True)
class Passes:
    """A network whose passes are programs of their own."""

    network: Any

    def extend(self, cache, tokens, count, attention):
        return None, _extended(self.network, cache, tokens, count, attention)

    def denoise_canvas(self, cache, canvas, t, **inputs):
        return _canvas(self.network, cache, canvas, t, **inputs)

    def forward_positions(self, cache, tokens, at, t):
        return _positions(self.network, cache, tokens, at, t)

    def expected_embedding(self, logits):
        return _embedding(self.network, logits)

    def empty_cache(self, rows, slots):
        return self.network.empty_cache(rows, slots)


@functools.partial(jax.jit, static_argnums=4)
def _extended(network, cache, tokens, count, attention):
    return network.extend(cache, tokens, count, attention)[1]


@jax.jit
def _canvas(network, cache, canvas, t, **inputs):
    return network.denoise_canvas(cache, canvas, t, **inputs)


@jax.jit
def _positions(network, cache, tokens, at, t):
    return network.forward_positions(cache, tokens, at, t)


@jax.jit
def _embedding(network, logits):
    return network.expected_embedding(logits)


def generated(model, sampler, prompts, length, cfg_scale=0.0):
    """The new tokens [B, length] after rows of ids, and the forward passes."""
    widest, count = max(len(row) for row in prompts), jnp.asarray([len(row) for row in prompts], jnp.int32)
    tokens = np.array([np.pad(row, (0, widest - len(row))) for row in prompts], np.int32)
    prompt, sampler = Prompt(tokens=jnp.asarray(tokens), length=count), sampler.sized(widest, length)
    network = Passes(model.network)
    if cfg_scale:
        network = ProcessedDenoiser(
            network=network, mask=model.tokenizer.mask, cfg_scale=jnp.asarray(cfg_scale), prompt_length=count
        )
    cache = network.empty_cache(len(tokens), sampler.slots(widest, length))
    out = sampler.generate(network, cache, prompt, pipeline.row_keys(0, len(tokens)), max_new_tokens=length)
    return np.asarray(out.tokens), int(out.nfe)
