"""One canvas of a tiny network over approximate caches, and over none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.cache_policy import DelayedCache, DualCache, PrefixCache
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from support.tiny import EOS, MASK, VOCAB, model

NO_TEXT, NEVER, CANVAS, LENGTH = (0, 1), 99, 16, 10
POLICIES = {"prefix": PrefixCache(block_size=4), "dual": DualCache(block_size=4), "delayed": DelayedCache()}


def confidence(denoising_steps=8, eos=EOS, temperature=1.0, **rest):
    return Confidence(
        denoising_steps=denoising_steps,
        eos=eos,
        sampling=SamplingParams(temperature=temperature, suppressed=NO_TEXT),
        **rest,
    )


def approximate(policy, *, eos=EOS, record=False, **rest):
    return dataclasses.replace(exact(eos=eos, **rest), approximate_cache=policy, record=record)


def exact(*, eos=EOS, **rest):
    return BlockDiffusion(sampler=confidence(eos=eos, **rest), canvas_length=CANVAS, mask=MASK, eos=eos, align=0)


@functools.partial(jax.jit, static_argnums=0)
def _generate(text_sampler, bound, prompt, keys):
    cache = bound.empty_cache(prompt.length.shape[0], text_sampler.slots(prompt.tokens.shape[1], LENGTH))
    return text_sampler.generate(bound, cache, prompt, keys, max_new_tokens=LENGTH)


def generate(text_sampler, prompt, seed=0, rows=slice(None), layers=1):
    prompt = jax.tree.map(lambda a: a[rows], prompt)
    return _generate(text_sampler, model(layers), prompt, jax.random.split(jax.random.key(seed), 3)[rows])


def prompts(lengths=(6, 1, 3), suffix=None):
    tokens = np.random.default_rng(3).integers(3, VOCAB - 1, size=(len(lengths), 6))
    tokens = np.where(np.arange(6) < np.array(lengths)[:, None], tokens, 0)
    suffix = None if suffix is None else jnp.asarray([suffix] * len(lengths), jnp.int32)
    return Prompt(tokens=jnp.asarray(tokens, jnp.int32), length=jnp.asarray(lengths, jnp.int32), suffix=suffix)
