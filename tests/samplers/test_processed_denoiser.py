"""Classifier-free guidance: logits of p(x | prompt)^(1 + s) / p(x)^s, position by position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.text_samplers import TEXT_SAMPLERS, prompts
from support.tiny import MASK, generated, model

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.processed_denoiser import ProcessedDenoiser


def guided(prompt, scale):
    scale = jnp.asarray(scale, jnp.float32)
    return ProcessedDenoiser(network=model(), mask=MASK, cfg_scale=scale, prompt_length=prompt.length)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ["autoregressive", "confidence", "ancestral", "auto", "both ways"])
def test_no_guidance_is_the_network_itself(name):
    prompt, text_sampler = prompts([6, 1, 3]), TEXT_SAMPLERS[name]()
    one, plain = (generated(network, text_sampler, prompt) for network in (guided(prompt, 0.0), model()))
    assert (one.tokens == plain.tokens).all()


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["confidence", "autoregressive", "both ways"])
def test_guidance_moves_the_text(name):
    prompt, text_sampler = prompts([6, 5, 3]), TEXT_SAMPLERS[name]()
    one, plain = (generated(network, text_sampler, prompt) for network in (guided(prompt, 2.0), model()))
    assert (one.tokens != plain.tokens).any()


def test_logits_follow_the_formula_after_the_prompt_and_after_more_text():
    """By hand: the text with its prompt, and the text after the first token alone."""
    network, first, more = model(), jnp.array([[1, 5, 3, 7], [1, 4, 0, 0]]), jnp.array([[6, 2], [8, 3]])
    count, scale = np.array([4, 2]), 1.5
    prompt = Prompt(tokens=first, length=jnp.asarray(count))
    canvas = jnp.array([[MASK, 9, MASK], [2, MASK, MASK]])

    @jax.jit
    def by_guidance(steered):
        head, cache = steered.extend(steered.empty_cache(2, 8), first, count, Causal())
        behind, _ = steered.extend(cache, more, jnp.array([2, 2]), Causal())
        seen = steered.denoise_canvas(cache, canvas, jnp.array([0.5, 0.7]))
        return head.gather(count[:, None] - 1).logits(), behind.logits(), seen

    @functools.partial(jax.jit, static_argnums=0)
    def by_hand(row):
        logs = []
        for start in (first[row : row + 1, : count[row]], first[row : row + 1, :1]):
            said, own = network.extend(network.empty_cache(1, 12), start, jnp.array([start.shape[1]]), Causal())
            after, _ = network.extend(own, more[row : row + 1], jnp.array([2]), Causal())
            noisy = network.denoise_canvas(own, canvas[row : row + 1], jnp.array([[0.5, 0.7][row]]))
            logs.append([jax.nn.log_softmax(x[0]) for x in (said.logits()[:, -1:], after.logits(), noisy)])
        return [(1 + scale) * fixed - scale * without for fixed, without in zip(*logs, strict=True)]

    said = by_guidance(guided(prompt, scale))
    for row in range(2):
        for ours, theirs in zip(said, by_hand(row), strict=True):
            assert np.allclose(ours[row], theirs, atol=2e-4)


def test_a_canvas_with_its_prompt_is_contrasted_with_a_masked_prompt():
    network, canvas = model(), jnp.array([[1, 5, 3, MASK, 7, MASK]])
    prompt = Prompt(tokens=canvas[:, :3], length=jnp.array([3]))
    steered, t = guided(prompt, 2.0), jnp.array([0.5])
    said = steered.denoise_canvas(steered.empty_cache(1, 0), canvas, t)
    without = jnp.array([[MASK, MASK, MASK, MASK, 7, MASK]])
    one, other = (
        jax.nn.log_softmax(network.denoise_canvas(network.empty_cache(1, 0), c, t)) for c in (canvas, without)
    )
    assert np.allclose(said, 3 * one - 2 * other, atol=2e-4)


def test_a_row_alone_is_the_row_in_a_batch():
    prompt, text_sampler = prompts([6, 1, 3]), TEXT_SAMPLERS["confidence"]()
    batch = generated(guided(prompt, 1.5), text_sampler, prompt)
    alone = Prompt(tokens=prompt.tokens[2:, :3], length=prompt.length[2:])
    network, keys = guided(alone, 1.5), jax.random.split(jax.random.key(0), 3)[2:]
    cache = network.empty_cache(1, text_sampler.slots(3, 10))
    one = jax.jit(lambda keys: text_sampler.generate(network, cache, alone, keys, max_new_tokens=10))(keys)
    assert (one.tokens[0] == batch.tokens[2]).all()
