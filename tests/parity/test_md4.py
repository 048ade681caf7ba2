"""md4's schedules, weights and losses at fixed noise: its stored logits through our bound (arXiv 2406.04329)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.schedules import Cosine, Linear, Polynomial, Schedule
from diffusion_lm.types import DenseLogits

VOCAB = MASK = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squeezed:
    """md4 keeps alpha off both ends: (1 - 2e-4) alpha + 1e-4."""

    schedule: Schedule

    def alpha(self, t):
        return (1 - 2e-4) * self.schedule.alpha(t) + 1e-4

    def one_minus_alpha(self, t):
        return (1 - 2e-4) * self.schedule.one_minus_alpha(t) + 1e-4

    def dalpha(self, t):
        return (1 - 2e-4) * self.schedule.dalpha(t)


SCHEDULES = {"cosine": Cosine(), "linear": Linear(), "poly2": Polynomial(power=2.0)}


@pytest.fixture(params=SCHEDULES)
def named(request):
    return request.param, Absorbing(schedule=Squeezed(schedule=SCHEDULES[request.param]), mask=MASK)


def test_schedules(stored, named):
    name, process = named
    t = jnp.asarray(stored[f"{name}/grid_t"])
    np.testing.assert_allclose(process.schedule.alpha(t), stored[f"{name}/alpha"], atol=1e-6)
    np.testing.assert_allclose(process.schedule.dalpha(t), stored[f"{name}/dalpha"], rtol=1e-5, atol=1e-6)


def test_rate(stored, named):
    """md4 weighs with gamma' alpha = alpha' / (1 - alpha), where alpha is not so near 1 that float32 rounds it away."""
    name, process = named
    rate = np.asarray(process.rate_weight(jnp.asarray(stored[f"{name}/grid_t"])))
    np.testing.assert_allclose(-rate, stored[f"{name}/dgamma_times_alpha"], rtol=2e-3)
    np.testing.assert_allclose(-rate[1:], stored[f"{name}/dgamma_times_alpha"][1:], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("time", ["cont", "T1000", "T16"])
def test_losses_at_stored_noise(stored, named, time):
    name, process = named
    case = {k: stored[f"{name}/{time}/{k}"] for k in ("zt", "logits", "t_used", "diffusion_loss_per_example")}
    steps = int(time[1:]) if time != "cont" else 0
    t = jnp.asarray(case["t_used"], jnp.float32)[:, None]
    assert steps == 0 or (t - 1 / steps > 1e-6).all()  # md4's last step goes to its own alpha(0), ours to clean text
    for row, expected in enumerate(case["diffusion_loss_per_example"]):
        one = slice(row, row + 1)
        x0, zt, logits = (jnp.asarray(a[one]) for a in (stored["x0"], case["zt"], case["logits"]))
        loss = process.nelbo(DenseLogits(values=logits), x0, zt, t[one], jnp.ones(x0.shape), steps)
        # md4 subtracts nearby alphas in float32: in float64 its own formula gives numbers up to 2.2e-4 away.
        np.testing.assert_allclose(loss, expected, rtol=2.5e-4 if steps == 1000 else 2e-5)
