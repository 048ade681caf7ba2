"""Masked diffusion that spends itself on what is hard: by time and by token (MGDM, arXiv 2410.14157, section 3.2).

No bound: the numbers are for training only, and can't be compared with nats of another objective.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_lm.objectives.elbo import draw_times, one_text
from diffusion_lm.processes.base import Process, broadcast_times
from diffusion_lm.types import Batch, Denoise, Full, Loss, cross_entropy, loss_of

Array = jax.Array


def filled_in(
    denoise: Denoise, process: Process, key: Array, batch: Batch, t: Array, weight: Array, nats: Callable
) -> Loss:
    """The sum of weight [B, 1] x nats(logits, tokens) over what the noise at t [B, 1] changed, per target.

    The whole row is one text and one canvas, as in `elbo.ELBO`.
    """
    batch = one_text(batch)
    xt = jnp.where(batch.context_mask, batch.tokens, process.corrupt(key, batch.tokens, t))
    head = denoise(xt, t, attention=Full(), positions=batch.positions, segment_ids=batch.segment_ids)
    scored = (xt != batch.tokens) & (batch.segment_ids > 0)
    weights = jnp.where(scored, broadcast_times(weight, xt.shape[1]), 0.0)
    total = head.total(nats, weights, batch.tokens)
    return loss_of(head, total, jnp.sum(batch.loss_mask, dtype=jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MGDM:
    """steps: T, times 1/T, 2/T, .. 1; a time t counts 1 - t + 1/T (as shipped, T times that), a token of l nats
    alpha (1 - exp(-l)) ** gamma: what is known already counts little."""

    num_timesteps: int = 20
    alpha: float = 0.25
    gamma: float = 1.0
    canvas = 0
    causal = False
    prefix = None

    def __post_init__(self):
        if self.num_timesteps < 1 or self.alpha <= 0:
            raise ValueError(
                f"objective.num_timesteps={self.num_timesteps} and objective.alpha={self.alpha} must be positive"
            )
        if self.gamma != 0 and self.gamma < 1:
            raise ValueError(f"objective.gamma must be 0 or at least 1 (a gradient at 0), not {self.gamma}")

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        time_key, noise_key = jax.random.split(key)
        t = draw_times(time_key, (batch.tokens.shape[0], 1), self.num_timesteps)
        return {"canvas": filled_in(denoise, process, noise_key, batch, t, 1 - t + 1 / self.num_timesteps, self._nats)}

    def _nats(self, logits: Array, tokens: Array) -> Array:
        nats = cross_entropy(logits, tokens)
        return self.alpha * jnp.maximum(-jnp.expm1(-nats), 0.0) ** self.gamma * nats
