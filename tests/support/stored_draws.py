"""Draws as public code makes them from uniform numbers that it stored."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.samplers.sampling_params import SamplingParams


def chosen(p, uniforms):
    """The id with the largest p / (1e-10 - log(u + 1e-10)): p and uniforms [..., V] -> [...]."""
    return np.argmax(np.asarray(p, np.float64) / (1e-10 - np.log(np.asarray(uniforms, np.float64) + 1e-10)), axis=-1)


class NucleusWithoutCrossing(SamplingParams):
    """Their nucleus leaves out the token that crosses p, ours keeps it."""

    def sharpened(self, logits):
        p = jax.nn.softmax(logits, axis=-1)
        order = jnp.argsort(-p, axis=-1)
        within = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1) <= self.top_p
        kept = jnp.take_along_axis(within.at[..., 0].set(True), jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(kept, logits, -jnp.inf)
