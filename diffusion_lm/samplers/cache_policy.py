"""Which positions a pass over an approximate cache reads; the others are seen as they were when they were last read."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class CachePolicy(Protocol):
    """A frozen dataclass.

    block    the canvas is written in blocks of so many positions, from left to right; 0: as one
    refresh  every so many passes read all positions, counted from the first pass, which always does; 1: every pass,
             which is exact; 0: no other
    """

    block_size: int
    refresh: int

    def needed(self, undecided: Array, changed: Array) -> Array:
        """bool [B, L]: what a pass must read, given what is still `open` and what the last pass `changed`."""

    def widths(self, length: int) -> tuple[int, ...]:
        """How many positions a pass may be compiled for, ascending up to all; each is a program of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixCache:
    """Reads the block that is being written and all behind it; with a new block, everything (Fast-dLLM, arXiv
    2505.22618, section 3.2)."""

    block_size: int = 32
    refresh: int = 0

    def __post_init__(self):
        _check(self)

    def needed(self, undecided: Array, changed: Array) -> Array:
        start = block_start(undecided, self.block_size)
        return (positions(undecided) >= start) | (start != block_start(changed, self.block_size))

    def widths(self, length: int) -> tuple[int, ...]:
        return _quarters(length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualCache:
    """Reads the block that is being written; with a new block, everything (Fast-dLLM, section 3.2, DualCache). What an
    end of text closes behind the block is seen as masks until then."""

    block_size: int = 32
    refresh: int = 0

    def __post_init__(self):
        _check(self)

    def needed(self, undecided: Array, changed: Array) -> Array:
        start = block_start(undecided, self.block_size)
        return in_block(undecided, self.block_size) | (start != block_start(changed, self.block_size))

    def widths(self, length: int) -> tuple[int, ...]:
        return tuple(sorted({min(self.block_size, length), length}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedCache:
    """Reads what is open, and what the last pass wrote: a token's keys are kept one pass after it was written, not a
    mask's (dKV-Cache-Decode, arXiv 2505.15781, section 3.2). Anything may be written next."""

    refresh: int = 0
    block_size = 0

    def __post_init__(self):
        _check(self)

    def needed(self, undecided: Array, changed: Array) -> Array:
        return undecided | changed

    def widths(self, length: int) -> tuple[int, ...]:
        return _quarters(length)


def _check(policy: Any) -> None:
    if isinstance(policy, PrefixCache | DualCache) and policy.block_size < 1:
        raise ValueError(f"a cache's block must be at least 1, not {policy.block_size}")
    if policy.refresh < 0:
        raise ValueError(f"refresh must be at least 1 pass (or 0: never), not {policy.refresh}")


def positions(undecided: Array) -> Array:
    """int32 [1, L]: 0..L-1."""
    return jnp.arange(undecided.shape[1], dtype=jnp.int32)[None]


def block_start(where: Array, block_size: int) -> Array:
    """int32 [B, 1]: where the first block that has something begins. Every pass changes a token of the block that it
    writes, and none before, so that this tells of `changed` which block the last pass wrote."""
    return (jnp.argmax(where, axis=1) // block_size * block_size)[:, None].astype(jnp.int32)


def in_block(undecided: Array, block_size: int) -> Array:
    """bool [B, L]: the block that is being written."""
    start, at = block_start(undecided, block_size), positions(undecided)
    return (start <= at) & (at < start + block_size)


def _quarters(length: int) -> tuple[int, ...]:
    return tuple(sorted({-(-length * quarter // 4) for quarter in (1, 2, 3, 4)}))
