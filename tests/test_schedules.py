"""Schedules fall from 1 to 0, and their derivatives are derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.schedules import Cosine, Geometric, Linear, Polynomial

SCHEDULES = [
    Linear(),
    Cosine(),
    Polynomial(),
    Polynomial(power=1.0),
    Polynomial(power=0.5),
    Polynomial(power=7.3),
    Geometric(),
    Geometric(low=1e-5, high=20.0),
    Geometric(low=0.5, high=0.6),
]
TIMES = jnp.linspace(0.003, 0.997, 143)


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request):
    return request.param


def test_all_of_it_is_there_at_0_and_nothing_at_1(schedule):
    np.testing.assert_allclose(schedule.alpha(jnp.array([0.0, 1.0])), [1.0, 0.0], atol=1e-6)


def test_it_falls(schedule):
    alpha = np.asarray(schedule.alpha(jnp.linspace(0.0, 1.0, 400)))
    assert (np.diff(alpha) <= 1e-7).all()
    assert (schedule.dalpha(TIMES) < 0).all()


def test_dalpha_is_the_derivative(schedule):
    np.testing.assert_allclose(schedule.dalpha(TIMES), jax.vmap(jax.grad(schedule.alpha))(TIMES), rtol=2e-5)


def test_lost_is_the_rest_of_alpha_however_small(schedule):
    np.testing.assert_allclose(schedule.one_minus_alpha(TIMES), 1 - np.asarray(schedule.alpha(TIMES)), atol=2e-6)
    small = jnp.array([1e-5, 1e-3])
    with jax.enable_x64(True):
        exact = 1 - np.asarray(schedule.alpha(jnp.asarray(small, jnp.float64)))
    np.testing.assert_allclose(schedule.one_minus_alpha(small), exact, rtol=1e-5, atol=1e-15)


def test_any_shape_of_times_is_kept(schedule):
    t = jnp.full((2, 3), 0.3)
    assert schedule.alpha(t).shape == schedule.dalpha(t).shape == (2, 3)


def test_known_values():
    half = jnp.array([0.5])
    np.testing.assert_allclose(Cosine().alpha(half), 1 - 2**-0.5, rtol=1e-6)
    np.testing.assert_allclose(Polynomial(power=3.0).alpha(half), 7 / 8, rtol=1e-6)
    # the geometric mean of the two rates, 0.1, is the total noise half way
    ends = np.exp([-1e-3, -10.0, -0.1])
    np.testing.assert_allclose(Geometric().alpha(half), (ends[2] - ends[1]) / (ends[0] - ends[1]), rtol=1e-5)


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_a_power_that_is_none_is_refused(power):
    with pytest.raises(ValueError, match="power > 0"):
        Polynomial(power=power)


@pytest.mark.parametrize("ends", [{"low": 0.0}, {"low": 2.0, "high": 1.0}, {"low": 1.0, "high": 1.0}])
def test_noise_that_does_not_grow_is_refused(ends):
    with pytest.raises(ValueError, match="low < high"):
        Geometric(**ends)
