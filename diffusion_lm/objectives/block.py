"""Block diffusion (BD3-LM): blocks from left to right, denoised within each block."""

import dataclasses
from typing import Literal

import jax

from diffusion_lm.attention_patterns import BlockCausal, Causal
from diffusion_lm.layouts import Blocks
from diffusion_lm.objectives.base import Objective, check_num_timesteps, denoising_loss
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockELBO(Objective):
    """The negative ELBO of block diffusion (BD3-LM, arXiv 2503.09573, equation 7).

    One forward pass on [noisy ; clean] denoises every block of a row, each at its own time. Blocks of 1 are
    autoregression, a block of the row's length is masked diffusion.

    Args:
        block_size: positions that are denoised together.
        clean: attention of finished text, in training and in a sampler's cache. "block": full within each block, as
            published; "causal".
        num_timesteps: T; 0 for continuous time.
    """

    block_size: int = 16
    clean: Literal["block", "causal"] = "block"
    num_timesteps: int = 0
    trains_ar = False

    def __post_init__(self):
        check_num_timesteps(self.num_timesteps)
        _ = self.layout  # checks block_size

    @property
    def layout(self) -> Blocks:
        return Blocks(self.block_size, BlockCausal(self.block_size) if self.clean == "block" else Causal())

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        loss, _ = denoising_loss(denoise, process, key, batch, layout=self.layout, num_timesteps=self.num_timesteps)
        return {"canvas": loss}
