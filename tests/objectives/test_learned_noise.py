"""Noise that is learned with the network: the gradient that reaches its exponents, by enumeration in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracle import LENGTH, MASK, TEXTS, VOCAB, Oracle, batch_of, entropy, truth, wrong_conditionals

from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.learned_noise import LearnedNoise
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.state_dependent import LearnedMasking, StateDependentMasking
from diffusion_lm.schedules import Cosine, Linear
from diffusion_lm.types import DenseLogits

PATTERNS = np.array(list(itertools.product([False, True], repeat=LENGTH)))  # [16, 4]
LOG_POWERS = np.log([0.6, 1.0, 1.7])
SOME = TEXTS[::7]  # 12 of the world's, each as likely as there
TIMES = {0: (0.3, 0.85), 3: (1 / 3, 2 / 3, 1.0)}  # a loss is linear in texts and times: any few will do


def wrong(tokens, t, **where):
    """Some denoiser, and not of this noise."""
    return DenseLogits(values=jnp.asarray(wrong_conditionals(tokens), jnp.float64))


def laws(times, schedule):
    """q(pattern | text) by hand, [times, 12, 16]."""
    lost = np.array([float(schedule.one_minus_alpha(jnp.asarray(t))) for t in times])
    masked = lost[:, None, None] ** np.exp(LOG_POWERS)[SOME][None]  # [times, 12, 4]
    return np.prod(np.where(PATTERNS[None, None], masked[:, :, None], 1 - masked[:, :, None]), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laid(StateDependentMasking):
    """Noise, times and weights are given: `patterns` bool [B, 4], one for each draw in turn."""

    patterns: list
    times: jax.Array
    share: jax.Array

    def corrupt(self, key, x0, t):
        return jnp.where(self.patterns.pop(0), MASK, x0)

    def log_noise(self, x0, xt, t):
        return super().log_noise(x0, xt, self.times)

    def nelbo(self, head, x0, xt, t, weights, num_timesteps):
        return super().nelbo(head, x0, xt, self.times, weights * self.share, num_timesteps)


def expected_gradient(objective, schedule, draws):
    """Of an objective that draws noise so often: over texts, times and draws, each as likely as it is."""
    times, q = TIMES[objective.num_timesteps], laws(TIMES[objective.num_timesteps], schedule)
    cases = np.mgrid[(slice(len(times)), slice(len(SOME)), *[slice(16)] * draws)].reshape(2 + draws, -1)
    at, text, *pattern = cases[:, np.prod([q[cases[0], cases[1], p] for p in cases[2:]], axis=0) > 0]
    share = truth()[::7][text] / len(times) * np.prod([q[at, text, p] for p in pattern], axis=0)

    def loss(log_powers):
        process = Laid(
            schedule=schedule,
            mask=MASK,
            powers=jnp.exp(log_powers),
            patterns=[jnp.asarray(PATTERNS[p]) for p in pattern],
            times=jnp.asarray(np.array(times)[at][:, None]),
            share=jnp.asarray(share[:, None]),
        )
        return objective(wrong, process, jax.random.key(0), batch_of(SOME[text]))["canvas"].sum

    return jax.jit(jax.value_and_grad(loss))(jnp.asarray(LOG_POWERS))


def exact(num_timesteps, schedule):
    """The expectation, as a function of exponents that also say how likely each pattern is."""
    at, text, pattern = (a.reshape(-1) for a in np.mgrid[: len(TIMES[num_timesteps]), : len(SOME), :16])
    x0, t = jnp.asarray(SOME[text]), jnp.asarray(np.array(TIMES[num_timesteps])[at][:, None])
    xt, p = jnp.where(PATTERNS[pattern], MASK, x0), jnp.asarray(truth()[::7][text] / len(TIMES[num_timesteps]))

    def cost(log_powers):
        process = StateDependentMasking(schedule=schedule, mask=MASK, powers=jnp.exp(log_powers))
        share = p * jnp.exp(jnp.sum(process.log_noise(x0, xt, t), axis=1))
        return process.nelbo(wrong(xt, t), x0, xt, t, share[:, None] * jnp.ones((1, LENGTH)), num_timesteps)

    return jax.jit(cost)


@pytest.mark.parametrize(("num_timesteps", "schedule"), [(0, Linear()), (3, Cosine())], ids=str)
def test_the_gradient_of_exponents_agrees_with_finite_differences(num_timesteps, schedule):
    """Of what the bound is in the mean, by two draws; by one, that what is drawn depends on them is left out."""
    with jax.enable_x64(True):
        cost = exact(num_timesteps, schedule)
        slope = np.array([cost(LOG_POWERS + step) - cost(LOG_POWERS - step) for step in 1e-5 * np.eye(VOCAB)]) / 2e-5
        value, gradient = expected_gradient(LearnedNoise(num_timesteps=num_timesteps), schedule, draws=2)
        same, partial = expected_gradient(ELBO(num_timesteps=num_timesteps), schedule, draws=1)
        np.testing.assert_allclose([value, same], cost(LOG_POWERS), rtol=1e-9)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    assert np.abs(np.asarray(partial) - slope).max() > 0.01


def test_stated_noise_is_drawn():
    """`log_noise`, which the gradient goes by, against `corrupt`."""
    process, rows = LearnedMasking(mask=MASK).with_params({"log_powers": jnp.asarray(LOG_POWERS)}), 40_000
    x0 = jnp.tile(jnp.array([[0, 1, 2]], jnp.int32), (rows, 1))
    t = jnp.full((rows, 1), 0.6)
    masked = np.mean(np.asarray(process.corrupt(jax.random.key(0), x0, t)) == MASK, axis=0)
    stated = jnp.exp(jnp.stack([process.log_noise(x0[:1], xt[:1], t[:1])[0] for xt in (jnp.full_like(x0, MASK), x0)]))
    np.testing.assert_allclose(stated[0], 0.6 ** np.exp(LOG_POWERS), rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(stated, axis=0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(masked, stated[0], atol=4 * 0.5 / np.sqrt(rows))


def test_training_begins_as_masked_diffusion():
    """Before anything is learned the loss is the masked bound: of the true denoiser the entropy."""
    texts, learned = TEXTS[np.random.default_rng(0).choice(81, size=8_000, p=truth())], LearnedMasking(mask=MASK)
    process = learned.with_params(learned.init_params())
    loss = jax.jit(lambda key: LearnedNoise()(Oracle(), process, key, batch_of(texts))["canvas"])(jax.random.key(1))
    assert abs(float(loss.mean) * LENGTH - entropy()) < 0.1 and loss.weight == 8_000 * LENGTH


@pytest.mark.parametrize("process", [Absorbing(mask=MASK), LearnedMasking(mask=MASK)], ids=["masks", "nothing learned"])
def test_noise_without_exponents_is_refused(process):
    with pytest.raises(ValueError, match="set process=LearnedMasking"):
        LearnedNoise()(Oracle(), process, jax.random.key(0), batch_of(TEXTS[:2]))


def test_exponents_in_the_config_are_refused():
    with pytest.raises(ValueError, match="learned here"):
        LearnedMasking(powers=(1.0, 2.0, 3.0))
