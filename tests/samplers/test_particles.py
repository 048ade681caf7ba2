"""Importance weights are exact, and resampling by them gives the autoregressive distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracle import LENGTH, MASK, NEVER, TEXTS, OracleModel, p_value, truth
from support.text_samplers import canvases, prompts
from support.tiny import EOS, model
from support.tiny import MASK as TINY_MASK

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.base import Prompt, fields_of
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.particles import ParticleSampler
from diffusion_lm.samplers.sampling_params import SamplingParams

WORLD = OracleModel(1 + LENGTH)


def particle_sampler(particles, *, canvas=LENGTH, passes=1, mask=MASK, eos=NEVER, sampling=SamplingParams()):  # noqa: B008  (frozen)
    sampler = Ancestral(process=Absorbing(mask=mask), denoising_steps=passes, eos=eos, sampling=sampling)
    return particles_of(BlockDiffusion(sampler=sampler, canvas_length=canvas, mask=mask, eos=eos), particles)


def particles_of(blocks, num_particles):
    return ParticleSampler(**fields_of(blocks), num_particles=num_particles)


def begun(text_sampler, rows):
    prompt = Prompt(tokens=jnp.zeros((rows, 1), jnp.int32), length=jnp.ones(rows, jnp.int32))
    return text_sampler.init(
        WORLD, WORLD.empty(rows), prompt, jax.random.split(jax.random.key(1), rows), max_new_tokens=LENGTH
    )


@pytest.mark.parametrize(("canvas", "passes"), [(4, 1), (4, 3), (2, 1)])
def test_the_mean_weight_is_one(canvas, passes):
    """E[p / q] = 1 under the proposal, through all resampling."""
    text_sampler, rows = particle_sampler(4, canvas=canvas, passes=passes), 16_384

    @jax.jit
    def weights():
        state = begun(text_sampler, rows)
        for _ in range(LENGTH // canvas):
            state = text_sampler.step(WORLD, state)
        return jnp.exp(state.log_weight)

    means = np.asarray(weights()).reshape(-1, 4).mean(axis=1)
    assert abs(means.mean() - 1) < 4 * means.std() / np.sqrt(len(means))
    assert means.std() > 0.02  # or the proposals were right to begin with


def texts(text_sampler, groups):
    rows = groups * text_sampler.num_particles
    prompt = Prompt(tokens=jnp.zeros((rows, 1), jnp.int32), length=jnp.ones(rows, jnp.int32))
    generate = jax.jit(
        lambda keys: text_sampler.generate(WORLD, WORLD.empty(rows), prompt, keys, max_new_tokens=LENGTH).tokens
    )
    return np.asarray(generate(jax.random.split(jax.random.key(2), rows))).reshape(groups, -1, LENGTH)


def distance(tokens):
    """Total variation from the world's distribution."""
    counts = np.bincount(tokens @ np.array([27, 9, 3, 1]), minlength=len(TEXTS))
    return np.abs(counts / counts.sum() - truth()).sum() / 2


@pytest.mark.usefixtures("optimized")
@pytest.mark.cases(1)
@pytest.mark.parametrize("canvas", [4, 2])
def test_resampling_gives_the_distribution_that_proposals_miss(canvas):
    many = texts(particle_sampler(32, canvas=canvas), 4_096)
    alone = texts(particle_sampler(2, canvas=canvas), 4_096)
    assert p_value(many[:, 0]) > 1e-3
    assert distance(many.reshape(-1, LENGTH)) < distance(alone.reshape(-1, LENGTH)) / 4
    assert p_value(alone[:, 0]) < 1e-3  # two particles mend little: the test can tell


def test_nothing_is_weighted_or_returned_after_an_end_of_text():
    text_sampler = particle_sampler(
        4, canvas=4, passes=2, mask=TINY_MASK, eos=EOS, sampling=SamplingParams(suppressed=(0, 1))
    )
    prompt = prompts([3, 3, 3, 3, 5, 5, 5, 5])
    prompt = Prompt(tokens=prompt.tokens[jnp.array([0] * 4 + [4] * 4)], length=prompt.length)
    network, keys = model(), jax.random.split(jax.random.key(0), 8)
    cache = network.empty_cache(8, text_sampler.slots(6, 10))
    generation = jax.jit(lambda keys: text_sampler.generate(network, cache, prompt, keys, max_new_tokens=10))(keys)
    assert (np.asarray(generation.length) < 10).any()
    for tokens, length in zip(np.asarray(generation.tokens), np.asarray(generation.length), strict=True):
        assert not np.isin(tokens[:length], (0, 1, EOS, TINY_MASK)).any() and (tokens[length:] == TINY_MASK).all()


def test_a_group_does_not_depend_on_the_others():
    text_sampler = particle_sampler(
        4, canvas=4, passes=2, mask=TINY_MASK, eos=EOS, sampling=SamplingParams(suppressed=(0, 1))
    )
    prompt, network = prompts([3] * 4 + [6] * 4), model()
    prompt = Prompt(tokens=prompt.tokens[jnp.array([0] * 4 + [4] * 4)], length=prompt.length)
    keys = jax.random.split(jax.random.key(0), 8)

    def generated(prompt, keys):
        cache = network.empty_cache(len(keys), text_sampler.slots(6, 10))
        return jax.jit(lambda keys: text_sampler.generate(network, cache, prompt, keys, max_new_tokens=10))(keys).tokens

    alone = generated(Prompt(tokens=prompt.tokens[4:], length=prompt.length[4:]), keys[4:])
    assert (generated(prompt, keys)[4:] == alone).all()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: particle_sampler(1),
        lambda: particle_sampler(4, sampling=SamplingParams(temperature=0.5)),
        lambda: particle_sampler(4, sampling=SamplingParams(top_k=3)),
        lambda: particles_of(canvases(), 4),
        lambda: particles_of(canvases(kind=Ancestral, record=True), 4),
        lambda: particles_of(canvases(kind=Ancestral, align=0, canvas_length=20), 4),
        lambda: begun(particle_sampler(4), 6),
    ],
)
def test_what_can_not_be_weighted_is_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        bad()
    assert "\n" not in str(error.value)
