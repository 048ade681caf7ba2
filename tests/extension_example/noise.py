"""A process and an objective: masks whose number falls as the square of time, and MaskGIT's unweighted loss."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.layouts import WholeRow
from diffusion_lm.objectives.base import (
    Objective,
    corrupt,
    denoising_loss,
    draw_times,
    noised_mask,
    per_target,
    predict,
)
from diffusion_lm.processes.base import Process, broadcast_times
from diffusion_lm.schedules import Polynomial, Schedule

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erasing(Process):
    """A token is erased by time t with probability 1 - alpha(t); an erased one is the mask."""

    schedule: Schedule = dataclasses.field(default_factory=lambda: Polynomial(power=2.0))
    mask: int = -1

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        del key
        return jnp.full(shape, self.mask, jnp.int32)

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        kept = jax.random.uniform(key, x0.shape) < broadcast_times(self.schedule.alpha(t), x0.shape[1])
        return jnp.where(kept, x0, self.mask)

    def nelbo(self, head, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """Of continuous time: MD4, arXiv 2406.04329, equation 4."""
        del num_timesteps
        rate = broadcast_times(-self.schedule.dalpha(t) / self.schedule.one_minus_alpha(t), x0.shape[1])
        return head.cross_entropy(x0, jnp.where(xt == self.mask, rate * weights, 0.0))

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        pairs = jax.vmap(jax.random.split)(keys)
        tokens = jax.vmap(jax.random.categorical)(pairs[:, 0], logits)
        u = jax.vmap(lambda key: jax.random.uniform(key, xt.shape[1:]))(pairs[:, 1])
        hidden_t, hidden_s = self.schedule.one_minus_alpha(t), self.schedule.one_minus_alpha(s)
        shown = jnp.where(s <= 0, 1.0, 1.0 - hidden_s / hidden_t)
        return jnp.where((xt == self.mask) & (u < shown[:, None]), tokens, xt)

    def is_final(self, xs: Array, s: Array) -> Array:
        del s
        return xs != self.mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGIT(Objective):
    """The cross entropy of masked tokens, all weighted alike (arXiv 2202.04200, equation 1); the ELBO is reported."""

    weight: float = 1.0
    layout = WholeRow()
    trains_ar = False

    def __call__(self, denoise, process, key: Array, batch):
        time_key, noise_key = jax.random.split(key)
        t = draw_times(time_key, (batch.tokens.shape[0], 1))
        xt = corrupt(process, noise_key, batch, t)
        head, _ = predict(denoise, self.layout, batch, t, xt)
        scored = noised_mask(batch) & (xt == process.mask)
        total = self.weight * head.cross_entropy(batch.tokens, scored.astype(jnp.float32))
        return {"canvas": per_target(head, total, batch)}

    def elbo(self, denoise, process, key: Array, batch):
        loss, _ = denoising_loss(denoise, process, key, batch, layout=self.layout, num_timesteps=0)
        return {"canvas": loss}
