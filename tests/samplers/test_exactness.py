"""Samplers with the true denoiser of a small world: their texts have the world's distribution, or a test says not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.canvas import denoised
from support.oracle import LENGTH, MASK, NEVER, TEXTS, OracleModel, blank, conditionals, p_value, truth

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.first_hitting import FirstHitting
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.schedules import Cosine, Linear

pytestmark = pytest.mark.usefixtures("optimized")
ROWS = 4_096
SURE = 1e-3


def cleared(sampler, denoise=lambda tokens, t: conditionals(tokens)):
    return jax.jit(lambda canvas: denoised(sampler, denoise, canvas))(blank(ROWS, seed=0)).tokens


def generated(sampler, model_class=OracleModel):
    """4,096 texts after a begin token."""
    model = model_class(sampler.slots(1, LENGTH))
    prompt = Prompt(tokens=jnp.zeros((ROWS, 1), jnp.int32), length=jnp.ones(ROWS, jnp.int32))
    generate = jax.jit(lambda keys: sampler.generate(model, model.empty(ROWS), prompt, keys, max_new_tokens=LENGTH))
    generation = generate(jax.random.split(jax.random.key(1), ROWS))
    assert (generation.length == LENGTH).all()
    return generation


def ancestral(passes, schedule=Linear()):  # noqa: B008  (frozen)
    return Ancestral(process=Absorbing(schedule=schedule, mask=MASK), denoising_steps=passes, eos=NEVER)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_ancestral_in_many_steps(schedule):
    assert p_value(cleared(ancestral(120, schedule))) > SURE


def test_ancestral_on_other_grids_of_times():
    """The cosine grid; and a grid that ends early, with a step of its own for the rest."""
    one = ancestral(120)
    assert p_value(cleared(dataclasses.replace(one, cosine=True))) > SURE
    assert p_value(cleared(dataclasses.replace(one, end=1e-3, noise_removal="sample"))) > SURE


def test_first_hitting():
    """In as many steps as there are masks. One position fixed, a row has one step less."""
    sampler = FirstHitting(process=Absorbing(mask=MASK), denoising_steps=LENGTH, eos=NEVER)
    canvas = blank(ROWS, seed=0)
    done = jax.jit(lambda canvas: denoised(sampler, lambda tokens, t: conditionals(tokens), canvas))(canvas)
    assert p_value(done.tokens) > SURE and done.step == LENGTH
    with pytest.raises(ValueError, match="a step for each of 4 masks; got 3"):
        denoised(dataclasses.replace(sampler, denoising_steps=3), lambda tokens, t: conditionals(tokens), canvas)
    with pytest.raises(ValueError, match="needs masks under the linear schedule"):
        dataclasses.replace(sampler, process=Absorbing(schedule=Cosine(), mask=MASK))
    fixed = blank(8, fixed=np.arange(LENGTH)[None] == 0, prompt=2)
    assert denoised(sampler, lambda tokens, t: conditionals(tokens), fixed).step == LENGTH - 1


def test_first_hitting_times_are_the_masks_own():
    """The time of the next token among n masks is the largest of n uniform ones."""
    sampler = FirstHitting(process=Absorbing(mask=MASK), denoising_steps=LENGTH, eos=NEVER)
    first = sampler.init(blank(ROWS, seed=0))
    assert stats.kstest(np.asarray(first.time), lambda t: t**LENGTH).pvalue > SURE
    second = sampler.update(first, jnp.zeros((ROWS, LENGTH, 3)))
    assert stats.kstest(np.asarray(second.time / first.time), lambda t: t ** (LENGTH - 1)).pvalue > SURE
    left = np.asarray(second.undecided)
    assert stats.chisquare((~left).sum(axis=0)).pvalue > SURE and (left.sum(axis=1) == LENGTH - 1).all()


def test_autoregressive():
    generation = generated(AutoregressiveSampler(mask=MASK, eos=NEVER))
    assert p_value(generation.tokens) > SURE
    assert generation.nfe == LENGTH


@pytest.mark.parametrize("width", [1, 2, 4])
def test_canvas_by_canvas(width):
    passes = 1 if width == 1 else 120
    text_sampler = BlockDiffusion(sampler=ancestral(passes), canvas_length=width, mask=MASK, eos=NEVER)
    generation = generated(text_sampler)
    assert p_value(generation.tokens) > SURE


def test_one_position_at_a_time_is_exact():
    text_sampler = BlockDiffusion(
        sampler=Confidence(denoising_steps=1, eos=NEVER), canvas_length=1, mask=MASK, eos=NEVER
    )
    assert p_value(generated(text_sampler).tokens) > SURE


# Wrong samplers and networks fail the same test.


def test_all_at_once_is_noticed():
    assert p_value(cleared(Confidence(denoising_steps=1, eos=NEVER))) < 1e-9
    assert p_value(cleared(ancestral(2))) < 1e-9


def test_the_most_certain_first_is_noticed():
    """One position a step, but the sampled tokens decide which: likely tokens are favoured."""
    assert p_value(cleared(Confidence(denoising_steps=LENGTH, eos=NEVER))) < 1e-9


def test_logits_of_the_wrong_position_are_noticed():
    assert p_value(cleared(ancestral(30), lambda tokens, t: jnp.roll(conditionals(tokens), 1, axis=1))) < 1e-9


class Shifted(OracleModel):
    """A network off by one: it predicts the token after the next."""

    def _said_at(self, tokens, start, width):
        return super()._said_at(tokens, start + 1, width)


def test_a_shifted_model_is_noticed():
    assert p_value(generated(AutoregressiveSampler(mask=MASK, eos=NEVER), Shifted).tokens) < 1e-9


def test_another_temperature_is_noticed():
    warm = AutoregressiveSampler(mask=MASK, eos=NEVER, sampling=SamplingParams(temperature=1.2))
    assert p_value(generated(warm).tokens) < 1e-6


def test_fixed_positions_are_conditioned_on():
    """With the first position fixed, the others have their conditional distribution."""
    canvas = blank(ROWS, fixed=np.arange(LENGTH)[None] == 0, prompt=2)
    done = jax.jit(lambda c: denoised(ancestral(120), lambda tokens, t: conditionals(tokens), c))(canvas)
    code = np.asarray(done.tokens) @ np.array([27, 9, 3, 1])
    assert (np.asarray(done.tokens)[:, 0] == 2).all()
    p = truth()[TEXTS[:, 0] == 2]
    counts = np.bincount(code, minlength=81)[54:]
    assert stats.chisquare(counts, p / p.sum() * ROWS).pvalue > SURE
    assert (done.confidence[:, 1:] > 0).all()
