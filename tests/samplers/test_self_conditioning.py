"""Self-conditioning: every step receives the previous prediction, with any sampler, processor and guidance."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracle import blank
from support.small import module_of
from support.text_samplers import prompts
from support.tiny import MASK, VOCAB, generated
from support.tiny import model as plain_model

from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.base import Prompt, denoise
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.logits_processors import SuppressTokens
from diffusion_lm.samplers.processed_denoiser import ProcessedDenoiser
from diffusion_lm.samplers.renoising import Renoising
from diffusion_lm.samplers.revision import Revision

WIDTH, NEVER = 16, 99
ONE = {"denoising_steps": 4, "eos": NEVER}
SAMPLERS = {
    "confidence": lambda: Confidence(**ONE),
    "ancestral": lambda: Ancestral(process=Uniform(mask=MASK), **ONE),
    "renoising": lambda: Renoising(process=Uniform(mask=MASK), **ONE),
    "revision": lambda: Revision(sampler=Confidence(**ONE), rounds=2, span=2, mask=MASK),
}


@functools.cache
def network() -> BoundModel:
    sizes = {"width": WIDTH, "layers": 1, "heads": 2, "mlp_dim": 16}
    module = module_of(DenoiserSpec(**sizes, self_conditioning=True), VOCAB)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, module))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(a + rng.normal(scale=0.4, size=a.shape), jnp.float32), params)
    return BoundModel(module=module, params=params).for_sampling()


class Recorder:
    """A network that records its self-conditioning, and predicts something else each time."""

    def __init__(self):
        self.self_conds, self.predictions = [], []

    def __call__(self, query, cache):
        logits = jax.random.normal(jax.random.fold_in(jax.random.key(0), cache), (*query.tokens.shape, VOCAB))
        jax.debug.callback(self._note, query.self_cond, logits, ordered=True)
        return logits, cache + 1

    def _note(self, self_cond, logits):
        self.self_conds.append(self_cond)
        self.predictions.append(logits)

    def expected_embedding(self, logits):
        return 2 * jax.nn.softmax(logits)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_receives_the_previous_prediction(name):
    sampler, model = SAMPLERS[name](), Recorder()
    canvas, count = blank(2, 5, MASK), jnp.zeros((), jnp.int32)
    out = denoise(sampler, model, canvas, cache=count, embed=model.expected_embedding, self_cond_dim=VOCAB)
    jax.effects_barrier()
    assert (model.self_conds[0] == 0).all() and len(model.self_conds) == out.cache >= 3
    for self_cond, logits in zip(model.self_conds[1:], model.predictions[:-1], strict=True):
        np.testing.assert_allclose(self_cond, model.expected_embedding(logits), rtol=1e-6)
    assert out.state.step == out.cache and out.state.tokens.shape == (2, 5)


def text_sampler(name, canvas=4, **rest):
    rest = {"self_cond_dim": WIDTH} | rest
    return BlockDiffusion(sampler=SAMPLERS[name](), canvas_length=canvas, mask=MASK, eos=NEVER, **rest)


def test_a_row_alone_is_the_row_in_a_batch():
    """Over canvases and a cache, recorded: each canvas begins without a prediction."""
    prompt, one = prompts([6, 1, 3]), text_sampler("renoising", record=True)
    batch = generated(network(), one, prompt, length=8)
    assert (batch.tokens < MASK).all()
    alone = Prompt(tokens=prompt.tokens[2:, :3], length=prompt.length[2:])
    keys = jax.random.split(jax.random.key(0), 3)[2:]
    cache = network().empty_cache(1, one.slots(3, 8))
    row = jax.jit(lambda keys: one.generate(network(), cache, alone, keys, max_new_tokens=8))(keys)
    assert (row.tokens[0] == batch.tokens[2]).all()


def test_processors_and_guidance_pass_self_conditioning_on():
    prompt, told = prompts([6, 1, 3]), text_sampler("confidence")
    as_it_is = generated(network(), told, prompt, length=8).tokens
    ruled = ProcessedDenoiser(
        network=network(), mask=MASK, processor=SuppressTokens(tokens=()), cfg_scale=jnp.zeros(()),
        prompt_length=prompt.length,
    )  # fmt: skip
    assert (generated(ruled, told, prompt, length=8).tokens == as_it_is).all()
    untold = text_sampler("confidence", self_cond_dim=0)
    assert (generated(network(), untold, prompt, length=8).tokens != as_it_is).any()


def test_guidance_by_a_masked_prompt_is_refused():
    prompt = prompts([6, 1, 3])
    guided = ProcessedDenoiser(network=network(), mask=MASK, cfg_scale=jnp.ones(()), prompt_length=prompt.length)
    with pytest.raises(ValueError, match="needs its prompt in a cache"):
        generated(guided, text_sampler("confidence", canvas=16, align=0), prompt)


def test_a_network_trained_without_it_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"set model\.self_conditioning=true"):
        generated(plain_model(), text_sampler("confidence"), prompts([6, 1, 3]))
