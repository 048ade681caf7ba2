"""Autoregression and block diffusion at once, in one set of weights."""

import dataclasses

import jax

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.layouts import Blocks
from diffusion_lm.objectives.autoregressive import next_token_loss
from diffusion_lm.objectives.block import read_blocks
from diffusion_lm.objectives.elbo import check_num_timesteps
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """Both ways of writing in one set of weights and one pass: the autoregressive loss on the causal clean half,
    plus the blocks' bound on the noisy half. The cache that a sampler fills is exactly the autoregressive model's."""

    block_size: int = 16
    num_timesteps: int = 0
    trains_ar = True

    def __post_init__(self):
        check_num_timesteps(self.num_timesteps)
        _ = self.layout  # refuses a block that can't be

    @property
    def layout(self) -> Blocks:
        return Blocks(self.block_size, Causal())

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        loss, clean = read_blocks(
            denoise,
            process,
            key,
            batch,
            layout=self.layout,
            num_timesteps=self.num_timesteps,
        )
        return {"causal": next_token_loss(clean, batch), "canvas": loss}
