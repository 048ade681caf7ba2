"""A decoding step writes its cache in place: copying it for each token would cost more than the token."""

import re

import jax
import pytest
from support.tiny import MASK, model

from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.drafters import PromptLookup, TiDARDraft
from diffusion_lm.samplers.speculative import Speculative


@pytest.mark.cases(2)
@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="reads the CPU compiler's program; others name copies otherwise"
)
@pytest.mark.parametrize(
    "text_sampler",
    [
        AutoregressiveSampler(mask=MASK, eos=99),
        Speculative(mask=MASK, eos=99, drafter=PromptLookup(num_tokens=3), break_even=1.5),
        Speculative(mask=MASK, eos=99, drafter=TiDARDraft(num_tokens=1), break_even=1.5),
        BlockDiffusion(mask=MASK, eos=99, canvas_length=5, sampler=Confidence(denoising_steps=2, eos=99)),
    ],
    ids=lambda text_sampler: type(getattr(text_sampler, "drafter", text_sampler)).__name__,
)
def test_no_step_copies_the_cache(text_sampler):
    network, slots = model(layers=2), text_sampler.slots(2, 35)
    prompt = Prompt(tokens=jax.numpy.full((1, 2), 5), length=jax.numpy.full(1, 2))

    def generate(network, cache, keys):
        return text_sampler.generate(network, cache, prompt, keys, max_new_tokens=35)

    cache, keys = network.empty_cache(1, slots), jax.random.split(jax.random.key(0), 1)
    program = jax.jit(generate, donate_argnums=1).lower(network, cache, keys).compile().as_text()
    shapes = [",".join(map(str, array.shape)) for array in (cache.layers[0].k, cache.layers[0].v)]
    assert all(f"f32[{shape}]" in program for shape in shapes)
    copies = [found for shape in shapes for found in re.findall(rf"f32\[{shape}\]\S* copy\(", program)]
    assert not copies
