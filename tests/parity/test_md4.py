"""MD4's schedules, weights and losses at stored noise, through `Absorbing` (arXiv 2406.04329)."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from support import parity

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.schedules import Cosine, Linear, Polynomial, Schedule
from diffusion_lm.types import DenseLogits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squeezed:
    """MD4 keeps alpha off both ends: (1 - 2 eps) alpha + eps."""

    schedule: Schedule
    eps: float

    def alpha(self, t):
        return (1 - 2 * self.eps) * self.schedule.alpha(t) + self.eps

    def one_minus_alpha(self, t):
        return (1 - 2 * self.eps) * self.schedule.one_minus_alpha(t) + self.eps

    def dalpha(self, t):
        return (1 - 2 * self.eps) * self.schedule.dalpha(t)


SCHEDULES = pytest.mark.parametrize("name", parity.found("md4", r"[^/]+(?=/grid_t)"))


def process_of(name: str, config: dict) -> Absorbing:
    power = re.fullmatch(r"poly([\d.]+)", name)
    schedule = Polynomial(power=float(power[1])) if power else {"cosine": Cosine(), "linear": Linear()}[name]
    return Absorbing(schedule=Squeezed(schedule=schedule, eps=config["schedule_eps"]), mask=config["mask_id"])


@SCHEDULES
def test_schedule(stored, config, name):
    schedule = process_of(name[0], config).schedule
    t = jnp.asarray(stored[f"{name[0]}/grid_t"])
    np.testing.assert_allclose(schedule.alpha(t), stored[f"{name[0]}/alpha"], atol=1e-6)
    np.testing.assert_allclose(schedule.dalpha(t), stored[f"{name[0]}/dalpha"], rtol=1e-5, atol=1e-6)


@SCHEDULES
def test_rate_weight(stored, config, name):
    """MD4's weight is gamma' alpha = alpha' / (1 - alpha); in float32 it loses digits where alpha is near 1."""
    t, expected = stored[f"{name[0]}/grid_t"], stored[f"{name[0]}/dgamma_times_alpha"]
    rate = np.asarray(process_of(name[0], config).rate_weight(jnp.asarray(t)))
    np.testing.assert_allclose(-rate, expected, rtol=2e-3)
    np.testing.assert_allclose(-rate[t > 0.01], expected[t > 0.01], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("run", parity.found("md4", r"(?P<schedule>[^/]+)/(cont|T(?P<steps>\d+))"))
def test_loss_at_stored_noise(stored, config, run):
    """Continuous time and finitely many steps.

    MD4's last step ends at its own alpha(0) = 1 - eps, ours at clean text: that step is scaled to end there too.
    """
    process, steps = process_of(run["schedule"], config), int(run["steps"] or 0)
    case = {k: stored[f"{run[0]}/{k}"] for k in ("zt", "logits", "t_used", "diffusion_loss_per_example")}
    t = jnp.asarray(case["t_used"], jnp.float32)[:, None]
    for row, expected in enumerate(case["diffusion_loss_per_example"]):
        one = slice(row, row + 1)
        x0, zt, logits = (jnp.asarray(a[one]) for a in (stored["x0"], case["zt"], case["logits"]))
        loss = process.nelbo(DenseLogits(values=logits), x0, zt, t[one], jnp.ones(x0.shape), steps)
        if steps and t[row, 0] - 1 / steps <= 1e-6:
            alpha_0, alpha_t = (process.schedule.alpha(time) for time in (jnp.zeros(()), t[row, 0]))
            loss = loss * (alpha_0 - alpha_t) / (1 - alpha_t)
        # MD4 subtracts nearby alphas in float32. In float64 its formula gives numbers 2.2e-4 away at 1000 steps.
        np.testing.assert_allclose(loss, expected, rtol=max(2e-5, 2.5e-7 * steps))
