"""MGDM and the fixed masking rate: which tokens count and with which weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.objectives.base import draw_times
from diffusion_lm.planning.objectives import MGDM, FixedRate
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.types import Batch, DenseLogits

ROWS, LENGTH, VOCAB = 400, 12, 5
PROCESS = Absorbing(mask=VOCAB)


def rows() -> Batch:
    """Three context tokens, six targets, two repeated ends of text, and one position of padding."""
    at = np.arange(LENGTH)
    full = lambda a: jnp.asarray(np.broadcast_to(a, (ROWS, LENGTH)))  # noqa: E731
    return Batch(
        tokens=full(np.where(at < 11, at % VOCAB, VOCAB).astype(np.int32)),
        segment_ids=full((at < 11).astype(np.int32)),
        positions=full(at.astype(np.int32)),
        context_mask=full(at < 3),
        loss_mask=full((at >= 3) & (at < 9)),
    )


def cost(objective, nats):
    """The loss where every masked token costs `nats`, and the noisy rows and times that the network received."""
    received = []

    def denoise(xt, t, **_):
        received.append((xt, t))
        p = jnp.exp(-jnp.asarray(nats))
        right = jax.nn.one_hot(rows().tokens, VOCAB)
        return DenseLogits(values=jnp.log(right * p + (1 - right) * (1 - p) / (VOCAB - 1)))

    loss = objective(denoise, PROCESS, jax.random.key(0), rows())["canvas"]
    return loss, *received[0]


@pytest.mark.parametrize("objective", [MGDM(), FixedRate(time=0.7)], ids=str)
def test_context_is_never_noised_and_all_other_text_is(objective):
    loss, xt, t = cost(objective, 1.0)
    assert (xt[:, :3] == rows().tokens[:, :3]).all()
    masked = np.asarray(xt[:, 3:11] == VOCAB)
    assert abs(masked.mean() - np.asarray(t).mean()) < 0.03
    assert loss.weight == 6 * ROWS


def test_a_fixed_rate_is_the_cross_entropy_of_masked_tokens():
    loss, xt, t = cost(FixedRate(time=0.7), 1.3)
    assert (t == jnp.float32(0.7)).all()
    np.testing.assert_allclose(loss.sum, 1.3 * (xt[:, 3:11] == VOCAB).sum(), rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_mgdm_weighs_by_time_and_by_token(gamma):
    objective, nats = MGDM(num_timesteps=20, alpha=0.25, gamma=gamma), 0.8
    loss, xt, t = cost(objective, nats)
    assert np.allclose(np.asarray(t) * 20 % 1, 0, atol=1e-4) and t.min() > 0 and t.max() == 1
    by_time = (xt[:, 3:11] == VOCAB).sum(axis=1) * (1 - t[:, 0] + 1 / 20)
    np.testing.assert_allclose(loss.sum, by_time.sum() * 0.25 * (1 - np.exp(-nats)) ** gamma * nats, rtol=1e-5)


def test_a_certain_token_costs_nothing_and_its_gradient_is_finite():
    def total(scale):
        def denoise(xt, t, **_):
            return DenseLogits(values=scale * 100 * jax.nn.one_hot(rows().tokens, VOCAB))

        return MGDM()(denoise, PROCESS, jax.random.key(0), rows())["canvas"].sum

    value, gradient = jax.value_and_grad(total)(1.0)
    assert value == 0 and gradient == 0
    assert np.isfinite(jax.grad(total)(0.0))


def test_times_cover_their_grid():
    t = draw_times(jax.random.key(0), (400, 1), 20)
    assert len(np.unique(np.round(np.asarray(t) * 20))) == 20


@pytest.mark.parametrize(
    "make",
    [lambda: MGDM(num_timesteps=0), lambda: MGDM(gamma=0.5), lambda: MGDM(alpha=0.0), lambda: FixedRate(time=0.0)],
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(ValueError, match=r"objective\."):
        make()
