"""MDLM's losses at stored noise: logits of its network, rebuilt, through `Absorbing.nelbo` (arXiv 2406.07524)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import parity

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.score import AbsorbingScore
from diffusion_lm.schedules import Linear
from diffusion_lm.types import DenseLogits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """A schedule given by MDLM's total noise: alpha = exp(-sigma(t)), which never quite is 1 or 0."""

    sigma: Callable

    def alpha(self, t):
        return jnp.exp(-self.sigma(t))

    def one_minus_alpha(self, t):
        return -jnp.expm1(-self.sigma(t))

    def dalpha(self, t):
        return jax.jvp(self.alpha, (t,), (jnp.ones_like(t),))[1]


LOG_LINEAR = Noise(sigma=lambda t: -jnp.log1p(-0.999 * t))
# Importance sampling draws a time in which log(1 - alpha) grows evenly, from sigma = 0.001 to the other end.
EVEN = Noise(sigma=lambda t: -jnp.log1p(-(0.999**t) * 0.0009995 ** (1 - t)))
NOISES = {  # name in MDLM's code -> noise, relative tolerance
    "subs_cont": (LOG_LINEAR, 2e-5),
    "subs_changevar": (EVEN, 2e-4),  # MDLM's weight is -log 0.0009995 where log 0.999 - log 0.0009995 is exact
    "subs_T": (Linear(), 2e-5),
    "subs_geometric": (Noise(sigma=lambda t: 1e-3 ** (1 - t) * 5.0**t), 2e-5),
    "subs_linear": (Noise(sigma=lambda t: 1e-3 + t * (8 - 1e-3)), 2e-5),
}


def one_row(row, t, xt, x0):
    """Arguments of `nelbo` for one row: times [1, 1] and tokens [1, L]."""
    one = slice(row, row + 1)
    return jnp.asarray(x0[one]), jnp.asarray(xt[one]), jnp.asarray(t[one, None], jnp.float32), jnp.ones(x0[one].shape)


def ends_of_steps(t, steps):
    """The stored time is the uniform draw; MDLM rounds it up to a step's end after storing it."""
    return np.floor(t * steps) / steps + 1 / steps


def test_reference_network_reproduces_stored_logits(stored, network):
    """Without time conditioning, as it is trained, and with."""
    for name, sigma in (("model", np.zeros(len(stored["x0"]))), ("true", stored["forward/sigma"])):
        logits = network.logits(stored["forward/xt"], sigma)
        np.testing.assert_allclose(logits, stored[f"forward/backbone_logits_{name}_sigma"], atol=2e-5)


def test_schedule(stored):
    t = jnp.asarray(stored["schedule/t"])
    np.testing.assert_allclose(LOG_LINEAR.sigma(t), stored["schedule/loglinear_sigma"], rtol=2e-5)
    np.testing.assert_allclose(
        -LOG_LINEAR.dalpha(t) / LOG_LINEAR.alpha(t), stored["schedule/loglinear_dsigma"], rtol=2e-5
    )


@pytest.mark.parametrize(
    "run", parity.found("mdlm", r"loss/(?P<noise>subs_(cont|changevar|geometric|linear|T(?=\d)))(?P<steps>\d*)")
)
def test_loss_at_stored_noise(stored, network, run):
    (schedule, rtol), steps = NOISES[run["noise"]], int(run["steps"] or 0)
    x0, xt, t, nlls = (stored["x0"], *(stored[f"{run[0]}/{name}"] for name in ("xt", "t", "nlls")))
    t = ends_of_steps(t, steps) if steps else t
    process = Absorbing(schedule=schedule, mask=int(stored["mask_index"]))
    logits = network.logits(xt, np.zeros(len(x0)))[..., : process.mask]
    for row in range(len(x0)):
        head = DenseLogits(values=jnp.asarray(logits[row : row + 1], jnp.float32))
        loss = process.nelbo(head, *one_row(row, t, xt, x0), steps)
        np.testing.assert_allclose(loss, nlls[row].sum(), rtol=rtol)


def test_score_entropy_at_stored_noise(stored, network):
    """MDLM's network trained as SEDD's: conditioned on the noise; its logits are those of `AbsorbingScore`."""
    x0, xt, t, nlls = (stored["x0"], *(stored[f"loss/sedd/{name}"] for name in ("xt", "t", "nlls")))
    process = AbsorbingScore(schedule=LOG_LINEAR, mask=int(stored["mask_index"]))
    logits = network.logits(xt, np.asarray(LOG_LINEAR.sigma(jnp.asarray(t))))[..., : process.mask]
    for row in range(len(x0)):
        head = DenseLogits(values=jnp.asarray(logits[row : row + 1], jnp.float32))
        loss = process.nelbo(head, *one_row(row, t, xt, x0), 0)
        np.testing.assert_allclose(loss, nlls[row].sum(), rtol=2e-5)


@pytest.mark.parametrize("run", parity.found("mdlm", r"loss/d3pm_T(?P<steps>\d+)"))
def test_d3pm_at_stored_noise(stored, network, run):
    """D3PM's network may also predict the mask.

    Its loss is our bound, plus what the mask's probability costs by Bayes' rule (the mask is one more value of x_0),
    plus the cross-entropy of a clean text.
    """
    steps, x0, xt, mask_id = int(run["steps"]), stored["x0"], stored[f"{run[0]}/xt"], int(stored["mask_index"])
    t = ends_of_steps(stored[f"{run[0]}/t"], steps)
    log_p, clean = (
        np.asarray(jax.nn.log_softmax(jnp.asarray(network.logits(x, np.zeros(len(x))), jnp.float32), axis=-1))
        for x in (xt, x0)
    )
    for row, expected in enumerate(stored[f"{run[0]}/nlls"]):
        head = DenseLogits(values=jnp.asarray(log_p[row : row + 1, :, :mask_id]))
        bound = Absorbing(mask=mask_id).nelbo(head, *one_row(row, t, xt, x0), steps)
        now, then = t[row], t[row] - 1 / steps
        mask = np.exp(log_p[row, :, mask_id].astype(np.float64))[xt[row] == mask_id]
        whole, before = (np.log1p((1 - s) / s * mask) for s in (now, then))
        extra = 1 / steps / now * (whole - np.log1p(-mask)) + (1 - 1 / steps / now) * (whole - before)
        cross_entropy = -clean[row, np.arange(x0.shape[1]), x0[row]].sum()
        np.testing.assert_allclose(float(bound) + steps * extra.sum() + cross_entropy, expected.sum(), rtol=2e-4)


def test_importance_sampling_is_the_change_of_variables(stored):
    """Importance sampling moves drawn times to where all weigh the same: the weight left is a constant."""
    t, moved = (jnp.asarray(stored[f"loss/{name}/t"]) for name in ("subs_changevar", "subs_importance"))
    np.testing.assert_allclose(LOG_LINEAR.one_minus_alpha(moved), EVEN.one_minus_alpha(t), rtol=2e-4)
    np.testing.assert_array_equal(stored["loss/subs_importance/xt"], stored["loss/subs_changevar/xt"])
    np.testing.assert_allclose(stored["loss/subs_importance/nlls"], stored["loss/subs_changevar/nlls"], rtol=1e-6)
