"""Logits processors and guidance over approximate caches: exact if refreshed every step, applied under every policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.approximate_cache import POLICIES, approximate, exact, prompts
from support.logits_processors import Alternating, Tattling
from support.tiny import MASK, VOCAB, model

from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.cache_policy import DelayedCache, DualCache
from diffusion_lm.samplers.logits_processors import (
    Chain,
    FrequencyPenalty,
    NoRepeatNGram,
    SuppressTokens,
)
from diffusion_lm.samplers.processed_denoiser import ProcessedCache, ProcessedDenoiser

NEVER, LENGTH = 99, 10
RULE = Chain((SuppressTokens(tokens=(5,)), FrequencyPenalty(nats=0.7), NoRepeatNGram(size=2)))


def guided(network, prompt, scale=1.5):
    return both(network, prompt, scale, rule=None)


def both(network, prompt, scale=1.5, rule=RULE):
    """Guidance and a logits processor, as `pipeline.generate` combines them."""
    scale = jnp.asarray(scale, jnp.float32)
    return ProcessedDenoiser(network=network, mask=MASK, processor=rule, cfg_scale=scale, prompt_length=prompt.length)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(text_sampler, network, prompt, keys, length):
    cache = network.empty_cache(prompt.length.shape[0], text_sampler.slots(prompt.tokens.shape[1], length))
    return text_sampler.generate(network, cache, prompt, keys, max_new_tokens=length)


def generate(text_sampler, network, prompt, seed=0, rows=slice(None), length=LENGTH):
    keys = jax.random.split(jax.random.key(seed), 3)[rows]
    return _generate(text_sampler, network, prompt, keys[: len(prompt.length)], length)


def test_refreshed_every_step_it_is_exact():
    prompt = prompts()
    network = both(model(2), prompt)
    for seed in range(3):
        ours = generate(approximate(DelayedCache(refresh_every=1), eos=NEVER), network, prompt, seed)
        theirs = generate(exact(eos=NEVER), network, prompt, seed)
        assert (ours.tokens == theirs.tokens).all() and ours.nfe == theirs.nfe


@pytest.mark.parametrize("policy", POLICIES)
def test_a_processor_applies_at_the_right_columns(policy):
    """One position a step, so that each token sees the others; with guidance."""
    prompt, banned, size = prompts((6, 2, 3)), (5, 8), 2
    network = both(
        model(), prompt, rule=Chain((SuppressTokens(tokens=banned), Alternating(), NoRepeatNGram(size=size)))
    )
    generated = np.asarray(
        generate(approximate(POLICIES[policy], eos=NEVER, denoising_steps=16), network, prompt, seed=3).tokens
    )
    columns = np.asarray(prompt.length)[:, None] + np.arange(LENGTH)
    assert not np.isin(generated, banned).any() and ((generated - columns) % 2 == 0).all()
    for row, length, tokens in zip(generated, prompt.length, np.asarray(prompt.tokens), strict=True):
        text = [*tokens[:length].tolist(), *row.tolist()]
        runs = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        fixed, new = runs[: int(length) - size + 1], runs[int(length) - size + 1 :]
        assert len(set(new)) == len(new) and not set(new) & set(fixed)


def test_a_processor_sees_the_committed_tokens():
    """Each step predicts the number of committed tokens, and commits one more."""
    prompt = Prompt(tokens=jnp.full((1, 2), 5), length=jnp.full(1, 2))
    text_sampler = dataclasses.replace(
        approximate(DualCache(block_size=4), eos=NEVER, denoising_steps=9), canvas_length=11
    )
    generated = generate(
        text_sampler, ProcessedDenoiser(network=model(), mask=MASK, processor=Tattling()), prompt, length=9
    ).tokens[0]
    assert sorted(generated.tolist()) == list(range(2, 11))


def test_no_guidance_changes_nothing_and_guidance_does():
    prompt, text_sampler = prompts((6, 5, 3)), approximate(DualCache(block_size=4), eos=NEVER)
    plain = generate(text_sampler, ProcessedDenoiser(network=model(), mask=MASK, processor=RULE), prompt)
    free, steered = (generate(text_sampler, both(model(), prompt, scale), prompt) for scale in (0.0, 2.0))
    assert (free.tokens == plain.tokens).all() and free.positions_computed == plain.positions_computed
    assert (steered.tokens != plain.tokens).any()


class Listening:
    """A network that returns its inputs."""

    def forward_positions(self, cache, tokens, at, t):
        return jnp.zeros((*tokens.shape, VOCAB)), (tokens, at, t)


def test_half_of_the_rows_have_masked_prompts():
    """At all positions; generated tokens stay."""
    prompt = Prompt(tokens=jnp.zeros((2, 4), jnp.int32), length=jnp.array([4, 2]))
    tokens, at = jnp.array([[9, 2, 3, 7], [1, 2, 3, 6]]), jnp.array([[0, 2, 3, 4], [1, 2, 5, 8]])  # 8: nowhere
    _, cache = guided(Listening(), prompt).forward_positions(
        ProcessedCache(inner=None, text=None, length=jnp.zeros(2, jnp.int32)), tokens, at, jnp.array([0.5, 0.25])
    )
    read, where, t = cache.inner
    assert read.tolist() == [*tokens.tolist(), [MASK, MASK, MASK, 7], [MASK, 2, 3, 6]]
    assert where.tolist() == at.tolist() * 2 and t.tolist() == [0.5, 0.25] * 2


def test_a_row_alone_is_the_row_in_a_ragged_batch():
    prompt, text_sampler = prompts(), approximate(DualCache(block_size=4), eos=NEVER)
    batch = generate(text_sampler, both(model(), prompt), prompt)
    for row in (1, 2):
        alone = jax.tree.map(lambda a, row=row: a[row : row + 1], prompt)
        one = generate(text_sampler, both(model(), alone), alone, rows=slice(row, row + 1))
        assert (one.tokens[0] == batch.tokens[row]).all()
