"""The bound of noise that is learned with the network (MD4's generalised form, arXiv 2406.04329, section 6).

The exponents of `processes.tokenwise.LearnedMasking` stand in the bound's weights, where a gradient finds them, and in the law
of the noise that is drawn, where none does: q'(x_t | x_0) = q (log q)'. Of two draws x, y at one time t, each is the
other's baseline (REINFORCE, leave one out, as in the paper): the missing part is, without bias,
(f(x) - f(y)) / 2 x (log q(x) - log q(y))', f being what the text's row costs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import Full
from diffusion_lm.objectives.elbo import ELBO, draw_times, one_text
from diffusion_lm.processes.state_dependent import LearnedMasking, StateDependentMasking
from diffusion_lm.types import Batch, Denoise, Loss, loss_of

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedNoise(ELBO):
    """The same bound, of rows that are read twice, under two draws of noise."""

    def bound(self, denoise: Denoise, process: StateDependentMasking, key: Array, batch: Batch) -> dict[str, Loss]:
        """The same bound for its value only: one draw is enough."""
        return super().__call__(denoise, process, key, batch)

    def __call__(self, denoise: Denoise, process: StateDependentMasking, key: Array, batch: Batch) -> dict[str, Loss]:
        if not isinstance(process, StateDependentMasking) or isinstance(process, LearnedMasking):
            raise ValueError(
                f"LearnedNoise moves exponents, {type(process).__name__} has none: set process=LearnedMasking()"
            )
        batch, (time_key, *noise_keys) = one_text(batch), jax.random.split(key, 3)
        t = draw_times(time_key, (batch.tokens.shape[0], 1), self.num_timesteps)
        drawn = [
            jnp.where(batch.context_mask, batch.tokens, process.corrupt(key, batch.tokens, t)) for key in noise_keys
        ]
        scored = (~batch.context_mask & (batch.segment_ids > 0)).astype(jnp.float32)
        one, other = (jnp.sum(process.log_noise(batch.tokens, xt, t) * scored, axis=1) for xt in drawn)
        lead = one - other - jax.lax.stop_gradient(one - other)  # 0, but for its gradient
        where = {"attention": Full(), "positions": batch.positions, "segment_ids": batch.segment_ids}
        losses = []
        for xt, share in zip(drawn, (1.0 + lead, 1.0 - lead), strict=True):
            head = denoise(xt, t, **where)
            total = process.nelbo(head, batch.tokens, xt, t, 0.5 * share[:, None] * scored, self.num_timesteps)
            losses.append(loss_of(head, total, 0.5 * jnp.sum(batch.loss_mask, dtype=jnp.float32)))
        return {"canvas": losses[0] + losses[1]}
