"""Noise on vectors in place of tokens: each token's vector fades into Gaussian noise on a straight path.

z_t = alpha(t) e(x_0) + sigma(t) eps with alpha = 1 - t and sigma = noise x t: the path of flow matching (arXiv
2210.02747) and, as any such path, a Gaussian diffusion (VDM, arXiv 2107.00630; of vectors of tokens: Plaid, arXiv
2305.18619). From a network's p(x_0 | z_t) follow the mean vector m = E[e | z_t], the flow's velocity (z_t - m) / t,
and the score (alpha m - z_t) / sigma^2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.types import NoisyEmbeddings

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
    """noise  its standard deviation at t = 1, where a vector has 1 a coordinate on average. It only bends time: tokens
              are decided around sigma / alpha = sqrt(E) / 3 (three nats are E / 2 x the signal-to-noise ratio), and
              noise = sqrt(E) / 3 puts that at t = 1/2
    least     the time at which the path ends, and tokens are drawn from what the network says
    mask, width  the number of pieces, and E; `diffusion_lm.build` sets both
    """

    noise: float = 4.0
    least: float = 0.1
    mask: int = -1
    width: int = -1

    def __post_init__(self):
        if not 0 < self.noise < float("inf") or not 0 < self.least < 1:
            raise ValueError(
                f"process.noise={self.noise} must be a number above 0, process.least={self.least} between 0 and 1"
            )

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        """z_1, float32 of `shape` x E."""
        return self.noise * jax.random.normal(key, (*shape, self.width))

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        raise ValueError("Gaussian noise lies on vectors, not on tokens: set objective=EmbeddingFlow()")

    def sizes(self, t: Array) -> tuple[Array, Array]:
        """alpha and sigma at t, of t's shape."""
        return 1.0 - t, self.noise * t

    def mixed(self, key: Array, noised: Array, t: Array) -> NoisyEmbeddings:
        """A text of which bool [B, L] is noised at t [B, 1], the rest clean."""
        alpha, sigma = self.sizes(t)
        eps = jax.random.normal(key, (*noised.shape, self.width))
        more = jnp.where(noised, sigma, 0.0)[..., None] * eps
        return NoisyEmbeddings(jnp.where(noised, alpha, 1.0), more, self._told(noised, t))

    def held(self, z: Array, noised: Array, t: Array) -> NoisyEmbeddings:
        """A text of which bool [B, L] stands as z [B, L, E] at t [B, 1], the rest clean."""
        return NoisyEmbeddings(
            (~noised).astype(jnp.float32), jnp.where(noised[..., None], z, 0.0), self._told(noised, t)
        )

    def _told(self, noised: Array, t: Array) -> Array:
        """log p(z | x_0) = alpha / sigma^2 z . e(x_0) + what doesn't depend on x_0."""
        alpha, sigma = self.sizes(t)
        return jnp.where(noised, alpha / sigma**2, 0.0)

    def rate(self, t: Array) -> Array:
        """-1/2 d/dt of the signal-to-noise ratio (alpha / sigma)^2: what |e - m|^2 costs at t, in nats (VDM's
        continuous time)."""
        return (1.0 - t) / (self.noise**2 * t**3)

    def reverse(self, keys: Array, mean: Array, z: Array, t: Array, s: Array, churn: float) -> Array:
        """z_s of z_t and the mean vector m, one step t -> s < t, float32 [B, L, E]; keys [B], t and s [B].

        churn 1 draws from the diffusion's posterior given m (VDM, appendix A), 0 takes an Euler step of the flow's ODE,
        which draws nothing; between them, that much of the posterior's noise (DDIM, arXiv 2010.02502, section 4.1).
        """
        alpha, sigma, alpha_s, sigma_s = (a[:, None, None] for a in (*self.sizes(t), *self.sizes(s)))
        new = churn**2 * jnp.clip(1.0 - (alpha * sigma_s / (alpha_s * sigma)) ** 2, 0.0, 1.0)  # share of sigma_s^2
        kept, drawn = sigma_s * jnp.sqrt(1.0 - new), sigma_s * jnp.sqrt(new)
        eps = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
        return alpha_s * mean + kept / sigma * (z - alpha * mean) + drawn * eps
