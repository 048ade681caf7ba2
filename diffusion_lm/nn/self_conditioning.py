"""Self-conditioning: the network is told what it said of the same tokens a reading ago."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.nn.layers import RMSNorm, SwiGLU

Array = jax.Array


class SelfConditioning(nn.Module):
    """Adds a gated feed-forward of RMSNorm(soft) to the embedded tokens x [B, L, E], and normalises the sum: the form
    of DiffusionGemma's public code, of the idea of arXiv 2208.04202, section 3.

    soft float32 [B, L, E] is the mean vector of a prediction; None is all zeros, of which nothing is added.
    """

    architecture: "Architecture"  # noqa: F821  (the denoiser's file is above this one)

    @nn.compact
    def __call__(self, x: Array, self_cond: Array | None) -> Array:
        if self_cond is None and self.is_initializing():
            self_cond = jnp.zeros_like(x)
        if self_cond is not None:
            x = x + SwiGLU(self.architecture, name="mlp")(RMSNorm(name="soft_norm")(self_cond))
        return RMSNorm(name="sum_norm")(x)
