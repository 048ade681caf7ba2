"""A schedule without chance."""

import jax.numpy as jnp


class AllNoise:
    """All that may be noised is: nothing is random."""

    def alpha(self, t):
        return jnp.zeros_like(t)

    def one_minus_alpha(self, t):
        return jnp.ones_like(t)

    def dalpha(self, t):
        return -jnp.ones_like(t)
