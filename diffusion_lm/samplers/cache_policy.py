"""Cache policies: which positions a forward pass over an approximate cache computes anew; it attends to the others as
they were when last computed."""

import dataclasses
from typing import Protocol

import jax

from diffusion_lm.samplers.canvas_blocks import block_start, in_block, positions

Array = jax.Array


class CachePolicy(Protocol):
    """A frozen dataclass.

    block_size     the canvas is denoised in blocks of so many positions, from left to right, counted from the prompt's
                   end; 0: as one
    refresh_every  every so many steps compute all positions, counted from the first step, which always does; 1: every
                   step, which is exact; 0: no other
    """

    block_size: int
    refresh_every: int

    def needed(self, undecided: Array, changed: Array, origin: Array) -> Array:
        """bool [B, L]: what a step must compute, given what is undecided and what the previous step changed. Blocks are
        counted from position `origin` [B, 1]."""

    def widths(self, length: int) -> tuple[int, ...]:
        """How many positions a step may compute, ascending up to all; each is compiled separately."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedCache(CachePolicy):
    """Computes what is undecided and what the previous step committed: a token's keys are cached one step after it was
    committed (dKV-Cache-Decode, arXiv 2505.15781, section 3.2). Any position may be committed next."""

    refresh_every: int = 0
    block_size = 0

    def __post_init__(self):
        if self.refresh_every < 0:
            raise ValueError(f"refresh_every must be at least 1 step (or 0: never); got {self.refresh_every}")

    def needed(self, undecided: Array, changed: Array, origin: Array) -> Array:
        return undecided | changed

    def widths(self, length: int) -> tuple[int, ...]:
        return tuple(sorted({-(-length * quarter // 4) for quarter in (1, 2, 3, 4)}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixCache(DelayedCache):
    """Computes the current block and all positions after it; at the start of a block, everything (Fast-dLLM, arXiv
    2505.22618, section 3.2)."""

    block_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.block_size}")

    def needed(self, undecided: Array, changed: Array, origin: Array) -> Array:
        # every step changes a token of its block and none before: `changed` tells the previous step's block
        start = block_start(undecided, self.block_size, origin)
        return (positions(undecided) >= start) | (start != block_start(changed, self.block_size, origin))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualCache(PrefixCache):
    """Computes the current block; at its start, everything (Fast-dLLM, section 3.2, DualCache). What an end of text
    closes after the block is attended to as masks until then."""

    def needed(self, undecided: Array, changed: Array, origin: Array) -> Array:
        start = block_start(undecided, self.block_size, origin)
        return in_block(undecided, self.block_size, origin) | (start != block_start(changed, self.block_size, origin))

    def widths(self, length: int) -> tuple[int, ...]:
        return tuple(sorted({min(self.block_size, length), length}))
