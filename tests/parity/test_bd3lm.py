"""BD3-LM's losses at their own noise, each block at its time: its network, rebuilt, through our bound (2503.09573)."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import dit

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.types import DenseLogits

MASK, LENGTH = 60, 32
BLOCKS = pytest.mark.parametrize("block", [4, 8, 16])


def said(stored, weights, block, xt):
    """What the network says of the noisy half of [noisy ; clean]."""
    both = np.concatenate([xt, stored["x0"]], axis=1)
    mask, at = stored[f"mask/bs{block}"], np.tile(np.arange(LENGTH), 2)
    return dit.logits(weights, both, np.zeros(2), mask, at)[:, :LENGTH]


@BLOCKS
def test_the_network_is_rebuilt(stored, weights, block):
    expected = stored[f"forward/bs{block}/train_backbone_logits"]
    np.testing.assert_allclose(said(stored, weights, block, stored["forward/xt"]), expected, atol=2e-5)


@BLOCKS
@pytest.mark.parametrize("clip", ["", "_clip0.3_0.8_resample"])
def test_losses_at_stored_noise(stored, weights, block, clip):
    """Also where times come from a part of the interval: what a time weighs stays 1 / t."""
    t, xt, nlls = (stored[f"loss/bs{block}{clip}/{name}"] for name in ("t", "xt", "nlls"))
    logits = said(stored, weights, block, xt)[..., :MASK]
    for row in range(2):
        one = slice(row, row + 1)
        loss = Absorbing(mask=MASK).nelbo(
            DenseLogits(values=jnp.asarray(logits[one], jnp.float32)),
            jnp.asarray(stored["x0"][one]),
            jnp.asarray(xt[one]),
            jnp.asarray(t[one, ::block], jnp.float32),
            jnp.ones((1, LENGTH)),
            0,
        )
        np.testing.assert_allclose(loss, nlls[row].sum(), rtol=2e-5)
