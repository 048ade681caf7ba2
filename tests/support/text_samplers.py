"""Text samplers of every kind over one tiny network, and prompts for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.auto import Auto, PassCosts
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.drafters import PromptLookup
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.speculative import Speculative
from support.tiny import EOS, MASK, VOCAB, model

NO_TEXT = (0, 1)
NEVER = 99


def canvases(*, denoising_steps=3, canvas_length=4, eos=EOS, temperature=1.0, kind=Confidence, **rest):
    sampling = SamplingParams(temperature=temperature, suppressed=NO_TEXT)
    if kind is Confidence:
        sampler = Confidence(denoising_steps=denoising_steps, eos=eos, sampling=sampling)
    else:
        sampler = Ancestral(process=Absorbing(mask=MASK), denoising_steps=denoising_steps, eos=eos, sampling=sampling)
    return BlockDiffusion(sampler=sampler, canvas_length=canvas_length, mask=MASK, eos=eos, **rest)


def autoregressive(eos=EOS, temperature=1.0):
    return AutoregressiveSampler(
        mask=MASK, eos=eos, sampling=SamplingParams(temperature=temperature, suppressed=NO_TEXT)
    )


def auto(eos=EOS, temperature=1.0, step_s=1.0):
    """At these costs: canvases of 4 in 2 passes, and of 1 or 2 tokens that are left, token by token."""
    tail = Speculative(
        drafter=PromptLookup(num_tokens=2), mask=MASK, eos=eos, sampling=autoregressive(eos, temperature).sampling
    )
    whole = canvases(denoising_steps=2, eos=eos, temperature=temperature)
    return Auto(block_diffusion=whole, speculative=tail, costs=PassCosts(step_s=step_s, narrow_s=0.8, canvas_s=0.95))


TEXT_SAMPLERS = {
    "autoregressive": autoregressive,
    "confidence": canvases,
    "ancestral": functools.partial(canvases, kind=Ancestral),
    "blocks": functools.partial(canvases, clean=BlockCausal(4), align=4),
    "auto": auto,
    "both ways": functools.partial(canvases, align=0, canvas_length=20),
}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(text_sampler, bound, prompt, keys, length):
    rows, width = prompt.tokens.shape
    cache = bound.empty_cache(rows, max(text_sampler.slots(width, length), 1))
    return text_sampler.generate(bound, cache, prompt, keys, max_new_tokens=length)


def prompts(lengths, width=6):
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, VOCAB, size=(len(lengths), width))
    tokens = np.where(np.arange(width) < np.array(lengths)[:, None], tokens, 0)
    return Prompt(tokens=jnp.asarray(tokens, jnp.int32), length=jnp.asarray(lengths, jnp.int32))


def generate(text_sampler, prompt, length, seed=0):
    return _generate(text_sampler, model(), prompt, jax.random.split(jax.random.key(seed), 3), length)
