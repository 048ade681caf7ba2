"""Gaussian noise on token embeddings: each embedding fades into noise on a straight path.

z_t = alpha(t) e(x_0) + sigma(t) eps with alpha = 1 - t and sigma = noise * t. This is the path of flow matching (arXiv
2210.02747) and, as any such path, a Gaussian diffusion (VDM, arXiv 2107.00630; on token embeddings: Plaid, arXiv
2305.18619). A network's p(x_0 | z_t) gives the mean embedding m = E[e | z_t], the flow's velocity (z_t - m) / t and the
score (alpha m - z_t) / sigma^2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.processes.base import Process
from diffusion_lm.types import NoisyEmbeddings

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Process):
    """Noise on embeddings in place of tokens.

    Args:
        noise: standard deviation at t = 1, where an embedding's coordinates have 1 on average. It only rescales time:
            tokens are decided around sigma / alpha = sqrt(E) / 3 (three nats are E/2 times the signal-to-noise ratio),
            and noise = sqrt(E) / 3 puts that at t = 1/2.
        min_time: where the path ends and tokens are sampled from the network's prediction, in (0, 1).
        mask: the mask's id, which is the number of tokens; `sized` sets it.
        width: E; `sized` sets it.
    """

    noise: float = 4.0
    min_time: float = 0.1
    mask: int = -1
    width: int = -1

    def __post_init__(self):
        if not 0 < self.noise < float("inf"):
            raise ValueError(f"process.noise must be a positive number; got {self.noise}")
        if not 0 < self.min_time < 1:
            raise ValueError(f"process.min_time must lie between 0 and 1; got {self.min_time}")

    def sized(self, *, mask: int, width: int) -> "Gaussian":
        return dataclasses.replace(self, mask=mask, width=width)

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        """z_1, float32 of `shape` x E."""
        return self.noise * jax.random.normal(key, (*shape, self.width))

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        """Raises ValueError: this process noises no tokens."""
        raise ValueError("Gaussian noises embeddings, not tokens: set objective=EmbeddingFlowLoss()")

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """alpha(t) and sigma(t), of t's shape."""
        return 1.0 - t, self.noise * t

    def corrupt_embeddings(self, key: Array, noisy: Array, t: Array) -> NoisyEmbeddings:
        """z_t ~ q(z_t | x_0) where `noisy`, bool [B, L]; elsewhere the clean embedding. t is float32 [B, 1]."""
        alpha, sigma = self.alpha_sigma(t)
        eps = jnp.where(noisy, sigma, 0.0)[..., None] * jax.random.normal(key, (*noisy.shape, self.width))
        return NoisyEmbeddings(jnp.where(noisy, alpha, 1.0), eps, self._logit_scale(noisy, t))

    def as_embeddings(self, z: Array, noisy: Array, t: Array) -> NoisyEmbeddings:
        """z_t, float32 [B, L, E], where `noisy`, bool [B, L]; elsewhere the clean embedding. t is float32 [B, 1]."""
        return NoisyEmbeddings(
            (~noisy).astype(jnp.float32), jnp.where(noisy[..., None], z, 0.0), self._logit_scale(noisy, t)
        )

    def _logit_scale(self, noisy: Array, t: Array) -> Array:
        """alpha / sigma^2: log p(z | x_0) is that times z . e(x_0), plus what doesn't depend on x_0."""
        alpha, sigma = self.alpha_sigma(t)
        return jnp.where(noisy, alpha / sigma**2, 0.0)

    def snr_rate(self, t: Array) -> Array:
        """-1/2 d/dt (alpha / sigma)^2: the bound's weight of |e - m|^2 in continuous time, in nats (VDM)."""
        return (1.0 - t) / (self.noise**2 * t**3)

    def reverse(self, keys: Array, mean: Array, z: Array, t: Array, s: Array, churn: float) -> Array:
        """One step t -> s < t.

        Args:
            keys: [B], a key per row.
            mean: float32 [B, L, E], m = E[e | z_t].
            z: float32 [B, L, E], z_t.
            t, s: float32 [B].
            churn: 1 samples the diffusion's posterior given m (VDM, appendix A); 0 takes an Euler step of the flow's
                ODE, which is deterministic; between them, that share of the posterior's noise (DDIM, arXiv 2010.02502,
                section 4.1).

        Returns:
            z_s, float32 [B, L, E].
        """
        alpha, sigma, alpha_s, sigma_s = (a[:, None, None] for a in (*self.alpha_sigma(t), *self.alpha_sigma(s)))
        fresh = churn**2 * jnp.clip(1.0 - (alpha * sigma_s / (alpha_s * sigma)) ** 2, 0.0, 1.0)  # share of sigma_s^2
        kept, new = sigma_s * jnp.sqrt(1.0 - fresh), sigma_s * jnp.sqrt(fresh)
        eps = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
        return alpha_s * mean + kept / sigma * (z - alpha * mean) + new * eps
