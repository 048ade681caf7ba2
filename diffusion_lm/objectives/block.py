"""The bound of block diffusion: blocks from left to right, masks within each (BD3-LM, arXiv 2503.09573, equation 7).

One pass over [noisy ; clean] scores every block of a row, each at a time of its own. Block 1 is autoregression,
a block as wide as the row is masked diffusion.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.objectives.elbo import check_steps, noise_loss
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, BlockCausal, Causal, Denoise, Loss, NoisyClean, Readout

Array = jax.Array


def read_blocks(
    denoise: Denoise, process: Process, key: Array, batch: Batch, *, block: int, clean: Causal | BlockCausal, steps: int
) -> tuple[Loss, Readout]:
    """The blocks' bound, and what the clean half says. Raises if `block` does not divide the row."""
    length = batch.tokens.shape[1]
    if length % block:
        raise ValueError(f"blocks of {block} do not divide rows of {length}: set data.length to a multiple of {block}")

    def read(xt, t):
        return denoise(
            jnp.concatenate([xt, batch.tokens], axis=1),
            jnp.concatenate([t, jnp.zeros_like(t)], axis=1),
            reading=NoisyClean(block, clean),
            positions=batch.positions,
            segments=batch.segments,
        )

    return noise_loss(read, process, key, batch, length // block, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockELBO:
    """block: positions denoised together. clean: how the clean half reads itself, and so how a sampler's cache is
    filled: "block" (each block both ways, as published) or "causal". steps: 0 for continuous time, else T."""

    block: int = 16
    clean: Literal["block", "causal"] = "block"
    steps: int = 0
    causal = False

    def __post_init__(self):
        check_block(self.block, self.steps)

    @property
    def canvas(self) -> int:
        return self.block

    @property
    def prefix(self) -> Causal | BlockCausal:
        return BlockCausal(self.block) if self.clean == "block" else Causal()

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        loss, _ = read_blocks(denoise, process, key, batch, block=self.block, clean=self.prefix, steps=self.steps)
        return {"canvas": loss}


def check_block(block: int, steps: int) -> None:
    """Raises ValueError for a block or a number of steps that can't be."""
    if block < 1:
        raise ValueError(f"objective.block must be at least 1, not {block}")
    check_steps(steps)
