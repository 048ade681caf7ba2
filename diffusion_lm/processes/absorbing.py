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
        fixed_count: a span of n positions has ceil((1 - alpha(t)) n) masks, every subset of so many alike, in place of
            a mask at each position by chance (LLaDA, arXiv 2502.09992, equation 6). The bound in continuous time is the
            same and its noise smaller: no weight passes n, and no span is without a mask. Sampling doesn't change.
        mask: the mask's id; `sized` sets it.
    """

    schedule: Schedule = dataclasses.field(default_factory=Linear)
    fixed_count: bool = False
    mask: int = -1

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        del key  # the prior is one point: all masks
        return jnp.full(shape, self.mask, jnp.int32)

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        u = jax.random.uniform(key, x0.shape)
        if not self.fixed_count:
            return jnp.where(u < broadcast_times(self.schedule.alpha(t), x0.shape[1]), x0, self.mask)
        spans = u.reshape(*t.shape, -1)
        last = jnp.round(self._masked_share(t, x0) * spans.shape[2]).astype(jnp.int32) - 1
        limit = jnp.take_along_axis(jnp.sort(spans, axis=-1), last[..., None], axis=-1)
        return jnp.where((spans <= limit).reshape(x0.shape), self.mask, x0)

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """-log p(x_0 | x_t) of masked positions, times the rate -alpha'(t) / (1 - alpha(t)) (MDLM, equation 10; MD4,
        equation 4), or times T (alpha_s - alpha_t) / (1 - alpha_t) for one of T steps (MDLM, equation 8)."""
        if self.fixed_count and num_timesteps:
            raise ValueError("process.fixed_count=true counts in continuous time: set objective.num_timesteps=0")
        if self.fixed_count:
            weight = -self.schedule.dalpha(t) / self._masked_share(t, x0)
        elif num_timesteps:
            weight = num_timesteps * self.step_weight(t, t - 1 / num_timesteps)
        else:
            weight = self.rate_weight(t)
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

    def _masked_share(self, t: Array, x0: Array) -> Array:
        """1 - alpha(t), rounded up to a whole number of each span's positions, at least one."""
        broadcast_times(t, x0.shape[1])  # checks that spans divide the row
        size = x0.shape[1] // t.shape[1]
        return jnp.clip(jnp.ceil(self.schedule.one_minus_alpha(t) * size), 1, size) / size

    def rate_weight(self, t: Array) -> Array:
        """-alpha'(t) / (1 - alpha(t)): the weight of -log p(x_0 | x_t) of a masked position in continuous time."""
        return -self.schedule.dalpha(t) / self.schedule.one_minus_alpha(t)

    def step_weight(self, t: Array, s: Array) -> Array:
        """(alpha_s - alpha_t) / (1 - alpha_t): the same for a step t -> s of finitely many."""
        return self.reveal_probability(t, s)
