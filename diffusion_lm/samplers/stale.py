"""Which positions a pass over an approximate cache reads; the others are seen as they were when they were last read."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class Policy(Protocol):
    """A frozen dataclass.

    block    the canvas is written in blocks of so many positions, from left to right; 0: as one
    refresh  every so many passes read all positions, counted from the first pass, which always does; 1: every pass,
             which is exact; 0: no other
    """

    block: int
    refresh: int

    def needed(self, open: Array, changed: Array) -> Array:
        """bool [B, L]: what a pass must read, given what is still `open` and what the last pass `changed`."""

    def widths(self, length: int) -> tuple[int, ...]:
        """How many positions a pass may be compiled for, ascending up to all; each is a program of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Reads the block that is being written and all behind it; with a new block, everything (Fast-dLLM, arXiv
    2505.22618, section 3.2)."""

    block: int = 32
    refresh: int = 0

    def __post_init__(self):
        _check(self)

    def needed(self, open: Array, changed: Array) -> Array:
        start = block_start(open, self.block)
        return (positions(open) >= start) | (start != block_start(changed, self.block))

    def widths(self, length: int) -> tuple[int, ...]:
        return _quarters(length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dual:
    """Reads the block that is being written; with a new block, everything (Fast-dLLM, section 3.2, DualCache). What an
    end of text closes behind the block is seen as masks until then."""

    block: int = 32
    refresh: int = 0

    def __post_init__(self):
        _check(self)

    def needed(self, open: Array, changed: Array) -> Array:
        start = block_start(open, self.block)
        return in_block(open, self.block) | (start != block_start(changed, self.block))

    def widths(self, length: int) -> tuple[int, ...]:
        return tuple(sorted({min(self.block, length), length}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delayed:
    """Reads what is open, and what the last pass wrote: a token's keys are kept one pass after it was written, not a
    mask's (dKV-Cache-Decode, arXiv 2505.15781, section 3.2). Anything may be written next."""

    refresh: int = 0
    block = 0

    def __post_init__(self):
        _check(self)

    def needed(self, open: Array, changed: Array) -> Array:
        return open | changed

    def widths(self, length: int) -> tuple[int, ...]:
        return _quarters(length)


def _check(policy: Any) -> None:
    if isinstance(policy, Prefix | Dual) and policy.block < 1:
        raise ValueError(f"a cache's block must be at least 1, not {policy.block}")
    if policy.refresh < 0:
        raise ValueError(f"refresh must be at least 1 pass (or 0: never), not {policy.refresh}")


def positions(open: Array) -> Array:
    """int32 [1, L]: 0..L-1."""
    return jnp.arange(open.shape[1], dtype=jnp.int32)[None]


def block_start(where: Array, block: int) -> Array:
    """int32 [B, 1]: where the first block that has something begins. Every pass changes a token of the block that it
    writes, and none before, so that this tells of `changed` which block the last pass wrote."""
    return (jnp.argmax(where, axis=1) // block * block)[:, None].astype(jnp.int32)


def in_block(open: Array, block: int) -> Array:
    """bool [B, L]: the block that is being written."""
    start, at = block_start(open, block), positions(open)
    return (start <= at) & (at < start + block)


def _quarters(length: int) -> tuple[int, ...]:
    return tuple(sorted({-(-length * quarter // 4) for quarter in (1, 2, 3, 4)}))
