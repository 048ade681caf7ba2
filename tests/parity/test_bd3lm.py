"""BD3-LM's losses at stored noise, one time a block, through `Absorbing.nelbo` (arXiv 2503.09573)."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import parity

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.types import DenseLogits


def noisy_half_logits(stored, network, block, xt):
    """Logits of the noisy half of [noisy ; clean] under the stored block-diffusion mask: [B, L, rows]."""
    x0, mask = stored["x0"], stored[f"mask/bs{block}"]
    length = x0.shape[1]
    both, positions = np.concatenate([xt, x0], axis=1), np.tile(np.arange(length), 2)
    return network.logits(both, np.zeros(len(x0)), mask, positions)[:, :length]


@pytest.mark.parametrize("run", parity.found("bd3lm", r"forward/bs(?P<block>\d+)"))
def test_reference_network_reproduces_stored_logits(stored, network, run):
    logits = noisy_half_logits(stored, network, run["block"], stored["forward/xt"])
    np.testing.assert_allclose(logits, stored[f"{run[0]}/train_backbone_logits"], atol=2e-5)


@pytest.mark.parametrize("run", parity.found("bd3lm", r"loss/bs(?P<block>\d+)[^/]*"))
def test_loss_at_stored_noise(stored, network, run):
    """Times drawn from a clipped part of the interval keep the weight 1 / t."""
    mask, block, x0 = int(stored["mask_index"]), int(run["block"]), stored["x0"]
    t, xt, nlls = (stored[f"{run[0]}/{name}"] for name in ("t", "xt", "nlls"))
    logits = noisy_half_logits(stored, network, block, xt)[..., :mask]
    for row in range(len(x0)):
        one = slice(row, row + 1)
        loss = Absorbing(mask=mask).nelbo(
            DenseLogits(values=jnp.asarray(logits[one], jnp.float32)),
            jnp.asarray(x0[one]),
            jnp.asarray(xt[one]),
            jnp.asarray(t[one, ::block], jnp.float32),
            jnp.ones((1, x0.shape[1])),
            0,
        )
        np.testing.assert_allclose(loss, nlls[row].sum(), rtol=2e-5)
