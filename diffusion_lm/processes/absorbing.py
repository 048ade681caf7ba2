"""The absorbing process: a token survives to time t with probability alpha(t), else it is the mask."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import categorical
from diffusion_lm.processes.base import Process, broadcast_times
from diffusion_lm.schedules import Linear, Schedule
from diffusion_lm.types import LogitsHead

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absorbing(Process):
    """Masked diffusion (MDLM, arXiv 2406.07524, section 3; MD4, arXiv 2406.04329, section 2).

    Args:
        schedule: alpha(t).
        mask: the mask's id; `sized` sets it.
    """

    schedule: Schedule = dataclasses.field(default_factory=Linear)
    mask: int = -1

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        del key  # the prior is one point: all masks
        return jnp.full(shape, self.mask, jnp.int32)

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        kept = jax.random.uniform(key, x0.shape) < broadcast_times(self.schedule.alpha(t), x0.shape[1])
        return jnp.where(kept, x0, self.mask)

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """-log p(x_0 | x_t) of masked positions, times the rate -alpha'(t) / (1 - alpha(t)) (MDLM, equation 10; MD4,
        equation 4), or times T (alpha_s - alpha_t) / (1 - alpha_t) for one of T steps (MDLM, equation 8)."""
        weight = num_timesteps * self.step_weight(t, t - 1 / num_timesteps) if num_timesteps else self.rate_weight(t)
        scored = (xt == self.mask) & (weights != 0)
        return head.cross_entropy(x0, jnp.where(scored, broadcast_times(weight, x0.shape[1]) * weights, 0.0))

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        """A masked position is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t); MDLM, equation 6."""
        pairs = jax.vmap(jax.random.split)(keys)
        drawn = jax.vmap(categorical)(pairs[:, 0], logits)
        u = jax.vmap(lambda key: jax.random.uniform(key, xt.shape[1:]))(pairs[:, 1])
        revealed = (xt == self.mask) & (u < self.reveal_probability(t, s)[:, None])
        return jnp.where(revealed, drawn, xt)

    def is_final(self, xs: Array, s: Array) -> Array:
        del s
        return xs != self.mask

    def reveal_probability(self, t: Array, s: Array) -> Array:
        """The chance that a position masked at t is not masked at s < t; 1 where s = 0."""
        masked = self.schedule.one_minus_alpha
        return jnp.where(s <= 0, 1.0, (masked(t) - masked(s)) / masked(t))

    def rate_weight(self, t: Array) -> Array:
        """-alpha'(t) / (1 - alpha(t)): the weight of -log p(x_0 | x_t) of a masked position in continuous time."""
        return -self.schedule.dalpha(t) / self.schedule.one_minus_alpha(t)

    def step_weight(self, t: Array, s: Array) -> Array:
        """(alpha_s - alpha_t) / (1 - alpha_t): the same for a step t -> s of finitely many."""
        return self.reveal_probability(t, s)
