"""The uniform process: a token survives to time t with probability alpha(t), else it is a uniform random token."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.processes.interpolating import Interpolating, Noise
from diffusion_lm.schedules import Linear, Schedule

Array = jax.Array
_LEAST = 1e-12  # of alpha, which is nothing at t = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Interpolating):
    """Uniform diffusion (D3PM, arXiv 2107.03006; UDLM, arXiv 2412.10193; Duo, arXiv 2506.10892).

    Every later step may change a token again.

    mask  the mask's id, which this noise never uses; `diffusion_lm.build` sets it
    """

    schedule: Schedule = dataclasses.field(default_factory=Linear)
    mask: int = -1

    def noise(self, t: Array) -> Noise:
        kept, nothing = jnp.maximum(self.schedule.alpha(t), _LEAST), jnp.zeros_like(t)
        return Noise(
            kept=kept,
            masked=nothing,
            uniform=self.schedule.one_minus_alpha(t),
            mask_rate=nothing,
            uniform_rate=-self.schedule.dalpha(t) / kept,
        )
