"""A mask whose id lies inside the vocabulary, with tokens above it: no sampler emits it, whatever its logit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.auto import Auto, PassCosts
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.cache_policy import DualCache
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.drafters import MaskedDraft, PromptLookup, TiDARDraft
from diffusion_lm.samplers.logits_processors import Chain, FrequencyPenalty, NoRepeatNGram
from diffusion_lm.samplers.particles import ParticleSampler
from diffusion_lm.samplers.processed_denoiser import ProcessedDenoiser
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Remasking
from diffusion_lm.samplers.revision import Revision
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.speculative import Speculative
from diffusion_lm.types import Alignment, DenseLogits

VOCAB, MASK, EOS, SUPPRESSED = 10, 6, 8, 3  # tokens 7, 8 and 9 lie above the mask
COMMON = {"mask": MASK, "eos": EOS}
SAMPLING = SamplingParams(suppressed=(SUPPRESSED,))
STEPS = {"denoising_steps": 3, "eos": EOS, "sampling": SAMPLING}
MASKS = Absorbing(mask=MASK)
CANVAS = {
    "confidence": Confidence(**STEPS),
    "greedy": Confidence(**STEPS | {"sampling": dataclasses.replace(SAMPLING, temperature=0.0)}),
    "ancestral": Ancestral(process=MASKS, **STEPS),
    "remasking": Remasking(process=MASKS, remask=Cap(eta=0.3), **STEPS),
    "revision": Revision(sampler=Confidence(**STEPS), rounds=2, span=2, mask=MASK),
}
BLOCKS = {name: BlockDiffusion(sampler=sampler, canvas_length=4, **COMMON) for name, sampler in CANVAS.items()}
DRAFTERS = (PromptLookup(num_tokens=2), MaskedDraft(mask=MASK, num_tokens=2), TiDARDraft(num_tokens=1))
SPECULATIVE = {
    type(drafter).__name__: Speculative(drafter=drafter, sampling=SAMPLING, **COMMON) for drafter in DRAFTERS
}
SAMPLERS = BLOCKS | {
    "autoregressive": AutoregressiveSampler(sampling=SAMPLING, **COMMON),
    **SPECULATIVE,
    "auto": Auto(
        block_diffusion=BLOCKS["confidence"],
        speculative=SPECULATIVE["PromptLookup"],
        costs=PassCosts(step_s=1.0, narrow_s=0.8, canvas_s=0.95),
    ),
    "particles": ParticleSampler(sampler=CANVAS["ancestral"], canvas_length=4, num_particles=3, **COMMON),
    "full attention": BlockDiffusion(sampler=CANVAS["confidence"], canvas_length=16, align=0, **COMMON),
    "approximate cache": BlockDiffusion(
        sampler=Confidence(**STEPS | {"denoising_steps": 8}), canvas_length=16, align=0,
        approximate_cache=DualCache(block_size=4), **COMMON,
    ),
}  # fmt: skip


@struct.dataclass
class Lengths:
    """A cache that only has a length."""

    length: jax.Array
    slots: int = struct.field(pytree_node=False, default=1)


@dataclasses.dataclass(frozen=True)
class MaskLover:
    """A network that prefers the mask, then the suppressed token, then a token that depends on the position."""

    def _logits(self, at):
        likes = jnp.asarray([VOCAB - 1, 7, 2, 0])[at % 4]
        logits = 3.0 * jax.nn.one_hot(likes, VOCAB)
        return logits.at[..., MASK].set(20.0).at[..., SUPPRESSED].set(15.0)

    def empty_cache(self, rows, slots):
        return Lengths(length=jnp.zeros(rows, jnp.int32), slots=slots)

    def extend(self, cache, tokens, count, attention):
        head = DenseLogits(values=self._at(cache, tokens), alignment=Alignment.NEXT)
        return head, cache.replace(length=cache.length + count)

    def draft_and_verify(self, cache, tokens, count, masks, causal=False):
        head, after = self.extend(cache, tokens, count, None)
        return head, DenseLogits(values=jnp.repeat(head.values, masks, axis=1)), after

    def truncate(self, cache, count):
        return cache.replace(length=cache.length - count)

    def resize(self, cache, rows, slots=None):
        return cache.replace(length=jnp.take(cache.length, rows))

    def denoise_canvas(self, cache, canvas, t):
        return self._at(cache, canvas)

    def forward_positions(self, cache, tokens, at, t):
        return self._logits(at), cache

    def _at(self, cache, tokens):
        return self._logits(cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])


@functools.partial(jax.jit, static_argnums=(0, 1))
def generated(sampler, network, keys):
    prompt = Prompt(tokens=jnp.full((3, 2), 5, jnp.int32), length=jnp.full(3, 2, jnp.int32))
    cache = network.empty_cache(3, max(sampler.slots(2, 10), 1))
    return sampler.generate(network, cache, prompt, keys, max_new_tokens=10)


def keys(seed):
    return jax.random.split(jax.random.key(seed), 3)


@pytest.mark.cases(4)
@pytest.mark.parametrize("name", SAMPLERS)
def test_neither_the_mask_nor_a_suppressed_token_is_emitted(name):
    tokens = []
    for seed in range(4):
        generation = generated(SAMPLERS[name], MaskLover(), keys(seed))
        for row, length in zip(np.asarray(generation.tokens), np.asarray(generation.length), strict=True):
            assert not np.isin(row[:length], (MASK, SUPPRESSED, EOS)).any() and (row[length:] == MASK).all()
            tokens += row[:length].tolist()
    above = sum(token > MASK for token in tokens)
    assert above > len(tokens) / 5 > 0  # tokens above the mask are tokens like others


def test_logits_processors_take_the_mask_for_an_unknown_token():
    """Masks aren't counted, and no n-gram holds one."""
    rule = Chain((FrequencyPenalty(nats=1.0), NoRepeatNGram(size=2)))
    canvas = jnp.array([[5, MASK, MASK, MASK, 5, MASK]])
    network = ProcessedDenoiser(network=MaskLover(), mask=MASK, processor=rule)
    plain = MaskLover().denoise_canvas(MaskLover().empty_cache(1, 8), canvas, jnp.ones(1))
    logits = network.denoise_canvas(network.empty_cache(1, 8), canvas, jnp.ones(1))
    np.testing.assert_allclose(logits, plain.at[..., 5].add(-2.0))


def test_the_last_column_of_a_remasking_step_is_the_mask_s():
    """Rounding must not take a probability out of [0, 1]: its logarithm would be nan."""
    sampler = Remasking(process=MASKS, remask=ConfidenceBased(), denoising_steps=3, eos=-1)
    logits, tokens = jnp.zeros((1, 4, VOCAB)).at[..., MASK].set(-jnp.inf), jnp.array([[MASK, 1, 9, MASK]])
    t, s, sigma = jnp.full(1, 0.5), jnp.full(1, 0.25), jnp.array([[0.1, 1.0 + 1e-7, 0.2, 0.0]])
    law = np.asarray(sampler.probabilities(logits, tokens, t, s, sigma))
    assert law.shape == (1, 4, VOCAB + 1) and (law >= 0).all() and (law <= 1).all()
    np.testing.assert_allclose(law.sum(axis=-1), 1.0, rtol=1e-6)
    assert (law[..., MASK] == 0).all() and law[0, 1, VOCAB] == 1
