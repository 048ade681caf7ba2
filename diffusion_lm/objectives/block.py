"""The bound of block diffusion: blocks from left to right, masks within each (BD3-LM, arXiv 2503.09573, equation 7).

One pass over [noisy ; clean] scores every block of a row, each at a time of its own. Block 1 is autoregression,
a block as wide as the row is masked diffusion.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import BlockCausal, Causal
from diffusion_lm.layouts import Blocks
from diffusion_lm.objectives.elbo import check_num_timesteps, noise_loss
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, LogitsHead, Loss

Array = jax.Array


def read_blocks(
    denoise: Denoise,
    process: Process,
    key: Array,
    batch: Batch,
    *,
    layout: Blocks,
    num_timesteps: int,
) -> tuple[Loss, LogitsHead]:
    """The blocks' bound, and what the clean half says. Raises ValueError if blocks do not divide the row."""
    length = batch.tokens.shape[1]
    layout.check_row(length)

    def read(xt, t):
        return denoise(
            layout.attention.join(xt, batch.tokens),
            layout.attention.join(t, jnp.zeros_like(t)),
            attention=layout.attention,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )

    return noise_loss(read, process, key, batch, length // layout.size, num_timesteps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockELBO:
    """block: positions denoised together. clean: how the clean half reads itself, and so how a sampler's cache is
    filled: "block" (each block both ways, as published) or "causal". steps: 0 for continuous time, else T."""

    block_size: int = 16
    clean: Literal["block", "causal"] = "block"
    num_timesteps: int = 0
    trains_ar = False

    def __post_init__(self):
        check_num_timesteps(self.num_timesteps)
        _ = self.layout  # refuses a block that can't be

    @property
    def layout(self) -> Blocks:
        return Blocks(self.block_size, BlockCausal(self.block_size) if self.clean == "block" else Causal())

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        loss, _ = read_blocks(
            denoise,
            process,
            key,
            batch,
            layout=self.layout,
            num_timesteps=self.num_timesteps,
        )
        return {"canvas": loss}
