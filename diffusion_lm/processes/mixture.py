"""Masks and uniform noise in a mixture that changes with time; both pure processes are its limits."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.processes.interpolating import Interpolating, Noise
from diffusion_lm.schedules import Linear, Schedule

Array = jax.Array
_LEAST = 1e-12  # of alpha, which is nothing at t = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Interpolating):
    """GIDD's hybrid noise (arXiv 2503.04482, section 3.3): masks by `schedule`, and uniform noise between the ends.

    Training shows wrong tokens, so that sampling can correct them.

    Args:
        schedule: alpha(t) of the masks.
        uniform: the share of uniform tokens at its maximum, where alpha = 1/2 (GIDD's p_u), in (0, 1). Towards 0 this
            is the absorbing process; towards 1 the uniform one, in another time.
        mask: the mask's id, which is the number of tokens; `sized` sets it.
    """

    schedule: Schedule = dataclasses.field(default_factory=Linear)
    uniform: float = 0.1
    mask: int = -1

    def __post_init__(self):
        if not 0 < self.uniform < 1:
            raise ValueError(
                f"process.uniform={self.uniform} must lie between 0 and 1; for the ends: Absorbing, Uniform"
            )

    def noise(self, t: Array) -> Noise:
        """kept : masked : uniform = 1 : odds : peak sqrt(odds), with odds = (1 - alpha) / alpha."""
        alpha = jnp.maximum(self.schedule.alpha(t), _LEAST)
        odds = self.schedule.one_minus_alpha(t) / alpha
        peak = 2.0 * self.uniform / (1.0 - self.uniform)
        whole = 1.0 + odds + peak * jnp.sqrt(odds)  # of which 1 is kept
        speed = -self.schedule.dalpha(t) / alpha / (alpha * whole)  # at which odds grow, as a share
        return Noise(
            kept=1.0 / whole,
            masked=odds / whole,
            uniform=peak * jnp.sqrt(odds) / whole,
            mask_rate=speed,
            uniform_rate=0.5 * peak / jnp.sqrt(odds) * speed,
        )
