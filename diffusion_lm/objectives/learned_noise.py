"""Masked diffusion that learns its schedule with the network (MD4, arXiv 2406.04329, section 6)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.objectives.base import corrupt, draw_times, noised_mask, per_target, predict
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.state_dependent import LearnedMasking, StateDependentMasking
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedNoise(ELBO):
    """The negative ELBO of `processes.state_dependent.LearnedMasking`, with its whole gradient.

    The exponents occur in the bound's weights, which a gradient reaches, and in the distribution q of x_t, which it
    doesn't. As in MD4 the missing part is estimated by REINFORCE leave-one-out over two samples x, y of noise at one
    time, (f(x) - f(y)) / 2 * grad(log q(x) - log q(y)), where f is the loss of the row. So each row costs two passes.
    """

    def elbo(self, denoise: Denoise, process: StateDependentMasking, key: Array, batch: Batch) -> dict[str, Loss]:
        """The same bound from one sample of the noise."""
        return super().__call__(denoise, process, key, batch)

    def __call__(self, denoise: Denoise, process: StateDependentMasking, key: Array, batch: Batch) -> dict[str, Loss]:
        if not isinstance(process, StateDependentMasking) or isinstance(process, LearnedMasking):
            raise ValueError(
                f"LearnedNoise trains exponents, {type(process).__name__} has none: set process=LearnedMasking()"
            )
        batch, (time_key, *noise_keys) = self.layout.prepare(batch), jax.random.split(key, 3)
        t = draw_times(time_key, (batch.tokens.shape[0], 1), self.num_timesteps)
        samples = [corrupt(process, key, batch, t) for key in noise_keys]
        scored = noised_mask(batch).astype(jnp.float32)
        one, other = (jnp.sum(process.log_noise(batch.tokens, xt, t) * scored, axis=1) for xt in samples)
        lead = one - other - jax.lax.stop_gradient(one - other)  # its value is 0; only its gradient counts
        losses = []
        for xt, share in zip(samples, (1.0 + lead, 1.0 - lead), strict=True):
            head, _ = predict(denoise, self.layout, batch, t, xt)
            total = process.nelbo(head, batch.tokens, xt, t, 0.5 * share[:, None] * scored, self.num_timesteps)
            losses.append(per_target(head, total, batch, share=0.5))
        return {"canvas": losses[0] + losses[1]}
