"""Chain process's bound and way back, against all canvases of a small world (`chain`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chain
from support.canvas import denoised
from support.oracle import LENGTH, MASK, NEVER, VOCAB, blank, entropy, p_value, truth
from support.pages import example

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.flow import MaskFlow, UniformFlow
from diffusion_lm.processes.mixture import Mixture
from diffusion_lm.processes.score import AbsorbingScore, UniformScore
from diffusion_lm.processes.state_dependent import StateDependentMasking
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.schedules import Cosine, Geometric, Linear, Polynomial
from diffusion_lm.types import DenseLogits

TOKENWISE = StateDependentMasking(powers=(0.5, 1.0, 2.0), mask=MASK)
IN_STEPS = [Absorbing(mask=MASK), Uniform(mask=MASK), Mixture(uniform=0.2, mask=MASK), MaskFlow(mask=MASK), TOKENWISE]
SCORES = [AbsorbingScore(mask=MASK), UniformScore(mask=MASK)]
KINDS = [*IN_STEPS, *SCORES]
SCHEDULES = [Linear(), Cosine(), Polynomial(power=2.0), Geometric()]


def every(kinds=KINDS, schedules=SCHEDULES):
    cases = [dataclasses.replace(kind, schedule=schedule) for kind in kinds for schedule in schedules]
    return pytest.mark.parametrize("process", cases, ids=str)


@every()
def test_the_true_denoisers_bound_is_the_entropy(process):
    assert abs(chain.bound(process) - entropy()) < 1e-4


@every(schedules=[Linear()])
def test_float32_is_near(process):
    """A mixture's last noise comes and goes with the root of the time that is left, which float32 can't tell from 1."""
    assert abs(chain.bound(process, dtype=np.float32) - entropy()) < (1e-2 if isinstance(process, Mixture) else 1e-4)


@every(IN_STEPS, [Cosine()])
def test_steps_fall_towards_continuous_time(process):
    bounds = [chain.bound(process, num_timesteps) for num_timesteps in (1, 2, 4, 16)]
    assert (np.diff(bounds) < 0).all() and bounds[-1] > entropy()
    assert bounds[-1] - entropy() < 0.35 * (bounds[1] - entropy())


@every(IN_STEPS, [Linear()])
@pytest.mark.parametrize("num_timesteps", [1, 3])
def test_the_bound_lies_above_what_the_sampler_writes(process, num_timesteps):
    """For a wrong denoiser and a true one, exactly: the chain of its own steps, against its bound in as many steps."""
    for denoiser in (chain.true_denoiser, chain.wrong_denoiser):
        nll = -truth() @ np.log(chain.written(process, num_timesteps, denoiser))
        assert chain.bound(process, num_timesteps, denoiser) > nll - 1e-5
    assert nll > entropy()


@every(schedules=[Linear()])
def test_a_wrong_denoiser_costs_more(process):
    assert chain.bound(process, 0, chain.wrong_denoiser) > entropy() + 0.1


@pytest.mark.cases(4)
@every(schedules=[Linear(), Cosine()])
def test_composed_steps_give_the_data_back(process):
    """A mixture's noise starts and ends with the root of time: its error falls more slowly with the number of steps."""
    coarse, fine, finer = (np.abs(chain.written(process, n) - truth()).sum() / 2 for n in (2, 32, 128))
    assert coarse > 3 * fine > 4.5 * finer and finer < (4e-2 if isinstance(process, Mixture) else 1e-2)


@every(schedules=[Cosine()])
def test_drawn_noise_has_the_stated_law(process):
    rows = 40_000
    x0 = jnp.tile(jnp.array([[0, 2, 1, 1]], jnp.int32), (rows, 1))
    xt = np.asarray(jax.jit(process.corrupt)(jax.random.key(0), x0, jnp.full((rows, 1), 0.6)))
    q = chain.kernel(process, 0.6)
    for i, v in enumerate((0, 2, 1, 1)):
        law = np.bincount(xt[:, i], minlength=VOCAB + 1) / rows
        np.testing.assert_allclose(law, q[v], atol=4 * 0.5 / np.sqrt(rows))
    assert abs(np.corrcoef(*(xt[:, 2:] == 1).T)[0, 1]) < 4 / np.sqrt(rows)


@every(schedules=[Linear()])
def test_the_prior_is_the_noise_at_the_end(process):
    drawn = np.asarray(process.prior(jax.random.key(0), (10_000, 2)))
    law = np.bincount(drawn.reshape(-1), minlength=VOCAB + 1) / drawn.size
    np.testing.assert_allclose(law, chain.kernel(process, 1.0)[0], atol=4 * 0.5 / np.sqrt(drawn.size))


@pytest.mark.cases(3)
@every(schedules=[Linear()])
def test_ancestral_sampling_writes_the_data(process):
    """The sampler as it is used, 16 passes of the true denoiser, against the law of 16 exact steps."""
    rows, passes = 4_096, 16
    tables = jnp.asarray([chain.true_denoiser(process, (passes - i) / passes) for i in range(passes)], jnp.float32)
    code = jnp.asarray([64, 16, 4, 1])[None]

    def denoise(tokens, t):
        at = jnp.round((1 - t) * passes).astype(jnp.int32)
        return tables[at, jnp.sum(tokens * code, axis=1)]

    sampler = Ancestral(process=process, denoising_steps=passes, eos=NEVER)
    texts = jax.jit(lambda canvas: denoised(sampler, denoise, canvas))(blank(rows)).tokens
    assert p_value(texts, chain.written(process, passes)) > 1e-3


GRADIENTS = [*KINDS, UniformFlow(mask=MASK)]


@pytest.mark.parametrize(
    ("process", "num_timesteps"),
    [(dataclasses.replace(k, schedule=Cosine()), n) for k in GRADIENTS for n in ((0,) if k in SCORES else (0, 5))],
    ids=str,
)
def test_gradients_agree_with_finite_differences(process, num_timesteps):
    """In float64, along random directions, the last step included."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x0, xt = (
            rng.integers(VOCAB, size=(6, LENGTH)),
            rng.integers(VOCAB + isinstance(process, (Absorbing, Mixture)), size=(6, LENGTH)),
        )
        if isinstance(process, Absorbing):
            xt = np.where(xt == MASK, MASK, x0)
        t = jnp.asarray(np.arange(1, 7)[:, None].clip(max=5) / 5 - (0 if num_timesteps else 0.01))
        logits, way = rng.normal(size=(2, 6, LENGTH, VOCAB))

        def cost(step):
            said = DenseLogits(values=jnp.asarray(logits) + step * jnp.asarray(way))
            return process.nelbo(said, jnp.asarray(x0), jnp.asarray(xt), t, jnp.ones((6, LENGTH)), num_timesteps)

        slope = (cost(1e-5) - cost(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(cost)(0.0), slope, rtol=1e-6)


def test_a_mixtures_limits_are_the_pure_processes():
    """Little uniform noise: the masked bound. Nearly nothing but: the uniform one (bounds don't see time's pace)."""
    masked, uniform, little, most = (
        chain.bound(process, 0, chain.wrong_denoiser)
        for process in (
            Absorbing(mask=MASK),
            Uniform(mask=MASK),
            Mixture(uniform=1e-5, mask=MASK),
            Mixture(uniform=0.98, schedule=Polynomial(power=2.0), mask=MASK),
        )
    )
    assert abs(masked - uniform) > 0.02
    assert abs(little - masked) < 1e-3 and abs(most - uniform) < 1e-3


def test_even_exponents_are_the_masked_process():
    """In another time, if they aren't 1: the bound doesn't see it."""
    masked = [chain.bound(Absorbing(mask=MASK), num_timesteps, chain.wrong_denoiser) for num_timesteps in (0, 3)]
    for power, num_timesteps in ((1.0, 0), (1.0, 3), (2.0, 0)):
        even = chain.bound(
            StateDependentMasking(powers=(power,) * VOCAB, mask=MASK), num_timesteps, chain.wrong_denoiser
        )
        assert abs(even - masked[num_timesteps > 0]) < 1e-4


@pytest.mark.parametrize("powers", [(1.0, 2.0), (1.0, 2.0, 0.0), (1.0, 2.0, float("nan"))])
def test_exponents_that_fit_no_vocabulary_are_refused(powers):
    with pytest.raises(ValueError, match=r"process\.powers"):
        StateDependentMasking(powers=powers, mask=MASK)


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=str)
def test_the_documented_process_passes_the_same(schedule):
    process = example("my_package/process.py")["Blend"](schedule=schedule, mask=MASK)
    assert abs(chain.bound(process) - entropy()) < 1e-4
    coarse, fine = (np.abs(chain.written(process, n) - truth()).sum() / 2 for n in (2, 32))
    assert coarse > 3 * fine


class WrongWeight(Uniform):
    """The masked bound's rate 1 / t in place of the uniform one's."""

    def noise(self, t):
        return super().noise(t)._replace(uniform_rate=1 / t)


def test_a_wrong_weight_is_noticed():
    assert abs(chain.bound(WrongWeight(schedule=Cosine(), mask=MASK)) - entropy()) > 0.1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_mixture_of_one_is_refused(share):
    with pytest.raises(ValueError, match=r"process\.uniform"):
        Mixture(uniform=share)
