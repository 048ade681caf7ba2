"""From noise on embeddings to text: with the true denoiser the world's distribution, by diffusion and by the flow."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracle import MASK as WORLD_MASK
from support.oracle import NEVER, TEXTS, blank, p_value, truth
from support.small import module_of
from support.vectors import PROCESS, Seer

from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.samplers.base import Prompt, denoise
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.embedding_flow import EmbeddingFlowSampler

VOCAB = MASK = 12


@functools.partial(jax.jit, static_argnums=0)
def cleared(sampler, canvas):
    def predict(query, cache):
        return Seer()(query.tokens, query.t, embeddings=query.embeddings), cache

    return denoise(sampler, predict, canvas, embed=Seer().expected_embedding).state


def sampler(passes, churn=1.0):
    return EmbeddingFlowSampler(process=PROCESS, denoising_steps=passes, eos=NEVER, churn=churn)


@pytest.mark.usefixtures("optimized")
@pytest.mark.cases(1)
@pytest.mark.parametrize("churn", [0.0, 1.0])
def test_the_true_denoiser_gives_the_true_distribution(churn):
    many = cleared(sampler(64, churn), blank(4_096))
    assert p_value(many.tokens) > 1e-3 and not many.undecided.any() and many.step == 64


def test_few_steps_sample_dependent_tokens_independently():
    one, few = (p_value(cleared(sampler(n), blank(4_096)).tokens) for n in (1, 4))
    assert one < 1e-9 and one <= few < 1e-3


@pytest.mark.usefixtures("optimized")
def test_fixed_tokens_stay_and_are_conditioned_on():
    canvas = blank(4_096)
    fixed = jnp.zeros_like(canvas.fixed).at[:, 1].set(True)
    canvas = canvas.replace(fixed=fixed, undecided=~fixed, tokens=jnp.where(fixed, 2, WORLD_MASK))
    texts = np.asarray(cleared(sampler(64), canvas).tokens)
    assert (texts[:, 1] == 2).all()
    share = truth() * (TEXTS[:, 1] == 2)
    for i in (0, 2, 3):
        law = np.bincount(TEXTS[:, i], weights=share / share.sum(), minlength=3)
        np.testing.assert_allclose(np.bincount(texts[:, i], minlength=3) / len(texts), law, atol=0.035)


@functools.cache
def network() -> BoundModel:
    """Small and random, with time conditioning and self-conditioning."""
    sizes = {"width": 16, "layers": 1, "heads": 2, "mlp_dim": 16}
    module = module_of(DenoiserSpec(**sizes, time_conditioning=True, self_conditioning=True), VOCAB)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, module))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(a + rng.normal(scale=0.4, size=a.shape), jnp.float32), params)
    return BoundModel(module=module, params=params).for_sampling()


@functools.partial(jax.jit, static_argnums=(0, 4))
def generate(text_sampler, bound, prompt, keys, length):
    cache = bound.empty_cache(len(prompt.length), text_sampler.slots(prompt.tokens.shape[1], length))
    return text_sampler.generate(bound, cache, prompt, keys, max_new_tokens=length)


def test_a_row_alone_is_the_row_in_a_batch_and_no_mask_is_emitted():
    process = Gaussian(mask=MASK, width=16)
    one = EmbeddingFlowSampler(process=process, denoising_steps=5, eos=NEVER)
    text_sampler = BlockDiffusion(sampler=one, canvas_length=12, mask=MASK, eos=NEVER, align=0, self_cond_dim=16)
    prompt = Prompt(tokens=jnp.array([[1, 5, 3], [1, 0, 0], [1, 7, 0]]), length=jnp.array([3, 1, 2]))
    keys = lambda: jax.random.split(jax.random.key(0), 3)  # noqa: E731
    batch = generate(text_sampler, network(), prompt, keys(), 9)
    assert (batch.tokens < MASK).all() and batch.nfe == 5
    assert (generate(text_sampler, network(), prompt, keys(), 9).tokens == batch.tokens).all()
    for row in range(3):
        alone = Prompt(tokens=prompt.tokens[row : row + 1], length=prompt.length[row : row + 1])
        assert (generate(text_sampler, network(), alone, keys()[row : row + 1], 9).tokens[0] == batch.tokens[row]).all()


@pytest.mark.parametrize(
    "bad", [{"denoising_steps": 0}, {"churn": 1.5}, {"churn": float("nan")}, {"process": Absorbing(mask=MASK)}]
)
def test_impossible_values_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        EmbeddingFlowSampler(**{"process": PROCESS, "denoising_steps": 4, "eos": NEVER} | bad)
    assert "\n" not in str(error.value)
