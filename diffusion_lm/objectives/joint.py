"""Autoregression and block diffusion in one set of weights."""

import dataclasses

import jax

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.layouts import Blocks
from diffusion_lm.objectives.autoregressive import next_token_loss
from diffusion_lm.objectives.base import Objective, check_num_timesteps, denoising_loss
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Objective):
    """The sum of two losses from one forward pass on [noisy ; clean] with a causal clean part.

    The clean part has the autoregressive loss, the noisy part the negative ELBO of block diffusion (`block.BlockELBO`).
    A sampler's cache of finished text is exactly the autoregressive model's.

    Args:
        block_size: positions that are denoised together.
        canvas_weight: the noisy part's weight in training; the autoregressive loss has 1.
        num_timesteps: T; 0 for continuous time.
    """

    block_size: int = 16
    canvas_weight: float = 1.0
    num_timesteps: int = 0
    trains_ar = True

    def __post_init__(self):
        if not 0 < self.canvas_weight < float("inf"):
            raise ValueError(f"objective.canvas_weight must be positive; got {self.canvas_weight}")
        check_num_timesteps(self.num_timesteps)
        _ = self.layout  # checks block_size

    @property
    def layout(self) -> Blocks:
        return Blocks(self.block_size, Causal())

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        loss, clean = denoising_loss(denoise, process, key, batch, layout=self.layout, num_timesteps=self.num_timesteps)
        canvas = loss if self.canvas_weight == 1 else loss.replace(sum=self.canvas_weight * loss.sum)
        return {"causal": next_token_loss(clean, batch), "canvas": canvas}

    def elbo(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        """Both parts in nats."""
        return dataclasses.replace(self, canvas_weight=1.0)(denoise, process, key, batch)
