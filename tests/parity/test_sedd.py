"""SEDD's score entropy at stored noise: its stored scores through `AbsorbingScore` (arXiv 2310.16834)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.processes.score import AbsorbingScore
from diffusion_lm.types import DenseLogits


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLinear:
    """SEDD keeps a thousandth of the text to the end: alpha = 1 - 0.999 t."""

    def alpha(self, t):
        return 1 - self.one_minus_alpha(t)

    def one_minus_alpha(self, t):
        return 0.999 * t

    def dalpha(self, t):
        return jnp.full_like(t, -0.999)


@pytest.fixture(scope="module")
def process(config):
    """The mask is the row after the tokenizer's ids."""
    assert config["graph"]["type"] == "absorb"
    assert config["noise"]["type"] == "loglinear"
    return AbsorbingScore(schedule=LogLinear(), mask=config["tokens"])


def test_reference_network_reproduces_stored_scores(stored, config, network, process):
    """Scores are logits - log(e^sigma - 1) - log(number of ids), where scale_by_sigma is set; 0 at the token itself."""
    assert config["model"]["scale_by_sigma"]
    shift = np.log(np.expm1(stored["sigma"])) + np.log(process.mask)
    scores = network.logits(stored["xt"], stored["sigma"]) - shift[:, None, None]
    np.put_along_axis(scores, stored["xt"][..., None], 0.0, axis=-1)
    np.testing.assert_allclose(scores, stored["forward/log_score"], atol=2e-5)


def test_schedule(stored, process):
    t = jnp.asarray(stored["t"])
    alpha = process.schedule.alpha(t)
    np.testing.assert_allclose(-jnp.log(alpha), stored["sigma"], rtol=1e-5)
    np.testing.assert_allclose(-process.schedule.dalpha(t) / alpha, stored["dsigma"], rtol=1e-5)


def test_loss_at_stored_noise(stored, process):
    t = jnp.asarray(stored["t"])[:, None]
    log_odds = jnp.log(process.schedule.alpha(t) / process.schedule.one_minus_alpha(t))[..., None]
    logits = jnp.asarray(stored["forward/log_score"])[..., : process.mask] - log_odds + np.log(process.mask)
    x0, xt = (jnp.asarray(stored[name], jnp.int32) for name in ("x0", "xt"))
    for row, expected in enumerate(stored["loss/per_example"]):
        one = slice(row, row + 1)
        loss = process.nelbo(DenseLogits(values=logits[one]), x0[one], xt[one], t[one], jnp.ones((1, x0.shape[1])), 0)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
