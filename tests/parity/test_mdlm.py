"""MDLM's losses at their own noise: its network, rebuilt from the stored weights, through our bound (2406.07524)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import dit

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.score import AbsorbingScore
from diffusion_lm.schedules import Linear
from diffusion_lm.types import DenseLogits

MASK = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """A schedule by MDLM's total noise: alpha = exp(-sigma(t)), which never quite is 1 or 0."""

    sigma: Callable

    def alpha(self, t):
        return jnp.exp(-self.sigma(t))

    def one_minus_alpha(self, t):
        return -jnp.expm1(-self.sigma(t))

    def dalpha(self, t):
        return jax.jvp(self.alpha, (t,), (jnp.ones_like(t),))[1]


LOG_LINEAR = Noise(sigma=lambda t: -jnp.log1p(-0.999 * t))
# In the time that importance sampling draws evenly, log(1 - alpha) grows evenly, from sigma = 0.001 to the other's end.
EVEN = Noise(sigma=lambda t: -jnp.log1p(-(0.999**t) * 0.0009995 ** (1 - t)))
NOISES = {  # the peer's name -> noise, steps, tolerance
    "subs_cont": (LOG_LINEAR, 0, 2e-5),
    "subs_changevar": (EVEN, 0, 2e-4),  # the peer weighs with -log 0.0009995 in place of log 0.999 - log 0.0009995
    "subs_T1000": (Linear(), 1000, 2e-5),
    "subs_geometric": (Noise(sigma=lambda t: 1e-3 ** (1 - t) * 5.0**t), 0, 2e-5),
    "subs_linear": (Noise(sigma=lambda t: 1e-3 + t * (8 - 1e-3)), 0, 2e-5),
}


def test_the_network_is_rebuilt(stored, weights):
    """Without time, as it is trained, and with."""
    for name, sigma in (("model", np.zeros(2)), ("true", stored["forward/sigma"])):
        ours = dit.logits(weights, stored["forward/xt"], sigma)
        np.testing.assert_allclose(ours, stored[f"forward/backbone_logits_{name}_sigma"], atol=2e-5)


@pytest.mark.parametrize("name", NOISES)
def test_losses_at_stored_noise(stored, weights, name):
    schedule, steps, near = NOISES[name]
    xt, t, x0 = stored[f"loss/{name}/xt"], stored[f"loss/{name}/t"], stored["x0"]
    t = np.floor(t * steps) / steps + 1 / steps if steps else t  # the peer stores its draw, and then rounds it
    process = Absorbing(schedule=schedule, mask=MASK)
    logits = dit.logits(weights, xt, np.zeros(2))[..., :MASK]
    for row in range(2):
        one = slice(row, row + 1)
        said = DenseLogits(values=jnp.asarray(logits[one], jnp.float32))
        given = jnp.asarray(x0[one]), jnp.asarray(xt[one]), jnp.asarray(t[one, None], jnp.float32)
        loss = process.nelbo(said, *given, jnp.ones((1, x0.shape[1])), steps)
        np.testing.assert_allclose(loss, stored[f"loss/{name}/nlls"][row].sum(), rtol=near)


def test_score_entropy_at_stored_noise(stored, weights):
    """MDLM's network as SEDD's: told the noise, its logits are those that scores are made of."""
    xt, t, x0 = stored["loss/sedd/xt"], stored["loss/sedd/t"], stored["x0"]
    process = AbsorbingScore(schedule=LOG_LINEAR, mask=MASK)
    logits = dit.logits(weights, xt, np.asarray(LOG_LINEAR.sigma(jnp.asarray(t))))[..., :MASK]
    for row in range(2):
        one = slice(row, row + 1)
        given = jnp.asarray(x0[one]), jnp.asarray(xt[one]), jnp.asarray(t[one, None], jnp.float32)
        said = DenseLogits(values=jnp.asarray(logits[one], jnp.float32))
        loss = process.nelbo(said, *given, jnp.ones((1, x0.shape[1])), 0)
        np.testing.assert_allclose(loss, stored["loss/sedd/nlls"][row].sum(), rtol=2e-5)


def test_d3pm_at_stored_noise(stored, weights):
    """D3PM's network may also say that a token is the mask. Its loss is our bound, what that costs (by Bayes, with the
    mask as one more thing that a text may hold), and a clean text's surprise."""
    steps, xt, x0 = 1000, stored["loss/d3pm_T1000/xt"], stored["x0"]
    t = (np.floor(stored["loss/d3pm_T1000/t"] * steps) / steps + 1 / steps)[:, None]
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(dit.logits(weights, xt, np.zeros(2)), jnp.float32), axis=-1))
    clean = np.asarray(jax.nn.log_softmax(jnp.asarray(dit.logits(weights, x0, np.zeros(2)), jnp.float32), axis=-1))
    for row, expected in enumerate(stored["loss/d3pm_T1000/nlls"]):
        one, now, then = slice(row, row + 1), t[row, 0], t[row, 0] - 1 / steps
        given = jnp.asarray(x0[one]), jnp.asarray(xt[one]), jnp.asarray(t[one], jnp.float32)
        said = DenseLogits(values=jnp.asarray(log_p[one, :, :MASK]))
        bound = Absorbing(mask=MASK).nelbo(said, *given, jnp.ones((1, x0.shape[1])), steps)
        mask = np.exp(log_p[row, :, MASK].astype(np.float64))[xt[row] == MASK]
        whole, before = (np.log1p((1 - s) / s * mask) for s in (now, then))
        extra = 1 / steps / now * (whole - np.log1p(-mask)) + (1 - 1 / steps / now) * (whole - before)
        surprise = -clean[row, np.arange(x0.shape[1]), x0[row]].sum()
        np.testing.assert_allclose(float(bound) + steps * extra.sum() + surprise, expected.sum(), rtol=2e-4)


def test_importance_sampling_is_the_change_of_variables(stored):
    """Drawn times are moved to where they are worth the same, and weighed with what the density leaves: a constant."""
    t = jnp.asarray(stored["loss/subs_changevar/t"])
    moved = stored["loss/subs_importance/t"]
    np.testing.assert_allclose(LOG_LINEAR.one_minus_alpha(jnp.asarray(moved)), EVEN.one_minus_alpha(t), rtol=2e-4)
    np.testing.assert_array_equal(stored["loss/subs_importance/xt"], stored["loss/subs_changevar/xt"])
    np.testing.assert_allclose(stored["loss/subs_importance/nlls"], stored["loss/subs_changevar/nlls"], rtol=1e-6)
