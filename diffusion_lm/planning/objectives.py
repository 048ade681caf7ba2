"""Training losses for planning tasks: MGDM's reweighted masked diffusion, and a fixed masking rate as its control.

Neither is a likelihood bound: their values can't be compared with another objective's nats.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_lm.layouts import WholeRow
from diffusion_lm.objectives.base import Objective, corrupt, draw_times, per_target, predict
from diffusion_lm.processes.base import Process, broadcast_times
from diffusion_lm.types import Batch, Denoise, Loss, cross_entropy

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class MGDM(Objective):
    """Multi-granularity masked diffusion (arXiv 2410.14157, section 3.2): weights by time and by token.

    A masked token with cross entropy l at time t costs (1 - t + 1/T) alpha (1 - exp(-l))^gamma l, so that tokens which
    are already predicted well count little. (The published code multiplies the time weight by T.)

    Args:
      num_timesteps: T; times are drawn from 1/T, 2/T, ..., 1.
      alpha: scale of the token weight, above 0.
      gamma: exponent of the token weight; 0 weighs all tokens alike, else at least 1.
    """

    num_timesteps: int = 20
    alpha: float = 0.25
    gamma: float = 1.0
    layout = WholeRow()
    trains_ar = False

    def __post_init__(self):
        if self.num_timesteps < 1 or self.alpha <= 0:
            raise ValueError(
                f"objective.num_timesteps={self.num_timesteps} and objective.alpha={self.alpha} must be positive"
            )
        if self.gamma != 0 and self.gamma < 1:
            raise ValueError(
                f"objective.gamma must be 0 or at least 1, so that the gradient at 0 is finite; got {self.gamma}"
            )

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        time_key, noise_key = jax.random.split(key)
        t = draw_times(time_key, (batch.tokens.shape[0], 1), self.num_timesteps)
        weight = 1 - t + 1 / self.num_timesteps
        return {"canvas": _masked_loss(denoise, process, noise_key, batch, t, weight, self._token_loss)}

    def _token_loss(self, logits: Array, tokens: Array) -> Array:
        nats = cross_entropy(logits, tokens)
        return self.alpha * jnp.maximum(-jnp.expm1(-nats), 0.0) ** self.gamma * nats


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedRate(Objective):
    """BERT's masked-language-model loss (arXiv 1810.04805) with one masking rate: the control without diffusion.

    Args:
      time: in (0, 1]; each token is masked with probability 1 - alpha(time).
    """

    time: float = 0.5
    layout = WholeRow()
    trains_ar = False

    def __post_init__(self):
        if not 0 < self.time <= 1:
            raise ValueError(f"objective.time must be above 0 and at most 1; got {self.time}")

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        t = jnp.full((batch.tokens.shape[0], 1), self.time)
        return {"canvas": _masked_loss(denoise, process, key, batch, t, jnp.ones_like(t), cross_entropy)}


def _masked_loss(
    denoise: Denoise, process: Process, key: Array, batch: Batch, t: Array, weight: Array, token_loss: Callable
) -> Loss:
    """The sum over noised tokens of weight [B, 1] x token_loss(logits, tokens), per counted token.

    The whole row is one document and one canvas, as in `elbo.ELBO`. t is float32 [B, 1].
    """
    batch = WholeRow().prepare(batch)
    xt = corrupt(process, key, batch, t)
    head, _ = predict(denoise, WholeRow(), batch, t, xt)
    scored = (xt != batch.tokens) & (batch.segment_ids > 0)
    weights = jnp.where(scored, broadcast_times(weight, xt.shape[1]), 0.0)
    return per_target(head, head.weighted_loss(token_loss, weights, batch.tokens), batch)
