"""The control without diffusion: both ways, but always the same share masked."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.planning.objectives import filled_in
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, Loss, cross_entropy

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedRate:
    """BERT's loss (arXiv 1810.04805) at one time: each token is noise with probability 1 - alpha(time)."""

    time: float = 0.5
    canvas = 0
    causal = False
    prefix = None

    def __post_init__(self):
        if not 0 < self.time <= 1:
            raise ValueError(f"objective.time must be above 0 and at most 1, not {self.time}")

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        t = jnp.full((batch.tokens.shape[0], 1), self.time)
        return {"canvas": filled_in(denoise, process, key, batch, t, jnp.ones_like(t), cross_entropy)}
