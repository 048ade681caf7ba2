"""The bound of block diffusion: blocks from left to right, masks within each (BD3-LM, arXiv 2503.09573, equation 7).

One pass over [noisy ; clean] scores every block of a row, each at a time of its own. Block 1 is autoregression,
a block as wide as the row is masked diffusion.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.objectives.elbo import check_num_timesteps, noise_loss
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, BlockCausal, BlockDiffusionTraining, Causal, Denoise, LogitsHead, Loss

Array = jax.Array


def read_blocks(
    denoise: Denoise,
    process: Process,
    key: Array,
    batch: Batch,
    *,
    block_size: int,
    clean: Causal | BlockCausal,
    num_timesteps: int,
) -> tuple[Loss, LogitsHead]:
    """The blocks' bound, and what the clean half says. Raises if `block` does not divide the row."""
    length = batch.tokens.shape[1]
    if length % block_size:
        raise ValueError(
            f"blocks of {block_size} do not divide rows of {length}: set data.seq_len to a multiple of {block_size}"
        )

    def read(xt, t):
        return denoise(
            jnp.concatenate([xt, batch.tokens], axis=1),
            jnp.concatenate([t, jnp.zeros_like(t)], axis=1),
            attention=BlockDiffusionTraining(block_size, clean),
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )

    return noise_loss(read, process, key, batch, length // block_size, num_timesteps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockELBO:
    """block: positions denoised together. clean: how the clean half reads itself, and so how a sampler's cache is
    filled: "block" (each block both ways, as published) or "causal". steps: 0 for continuous time, else T."""

    block_size: int = 16
    clean: Literal["block", "causal"] = "block"
    num_timesteps: int = 0
    causal = False

    def __post_init__(self):
        check_block(self.block_size, self.num_timesteps)

    @property
    def canvas(self) -> int:
        return self.block_size

    @property
    def prefix(self) -> Causal | BlockCausal:
        return BlockCausal(self.block_size) if self.clean == "block" else Causal()

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        loss, _ = read_blocks(
            denoise,
            process,
            key,
            batch,
            block_size=self.block_size,
            clean=self.prefix,
            num_timesteps=self.num_timesteps,
        )
        return {"canvas": loss}


def check_block(block_size: int, num_timesteps: int) -> None:
    """Raises ValueError for a block or a number of steps that can't be."""
    if block_size < 1:
        raise ValueError(f"objective.block_size must be at least 1, not {block_size}")
    check_num_timesteps(num_timesteps)
