"""Blocks of a canvas that are denoised from left to right: where each begins, and how many steps it has."""

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import Canvas

Array = jax.Array


def positions(where: Array) -> Array:
    """int32 [1, L]: 0..L-1."""
    return jnp.arange(where.shape[1], dtype=jnp.int32)[None]


def first_free(fixed: Array) -> Array:
    """int32 [B, 1]: the first position that isn't fixed, where a canvas's prompt ends."""
    return jnp.argmax(~fixed, axis=1)[:, None].astype(jnp.int32)


def block_start(where: Array, block_size: int, origin: Array | int) -> Array:
    """int32 [B, 1]: the start of the first block with a position in `where`, of blocks counted from `origin` [B, 1]."""
    first = jnp.argmax(where, axis=1)[:, None].astype(jnp.int32)
    return (first - origin) // block_size * block_size + origin


def in_block(undecided: Array, block_size: int, origin: Array | int) -> Array:
    """bool [B, L]: the first unfinished block."""
    start, at = block_start(undecided, block_size, origin), positions(undecided)
    return (start <= at) & (at < start + block_size)


def num_blocks(where: Array, block_size: int, origin: Array | int) -> Array:
    """int32 [B]: how many blocks have a position in `where`."""
    block = jnp.broadcast_to((positions(where) - origin) // block_size, where.shape)
    seen = jax.lax.cummax(jnp.where(where, block, -1), axis=1)
    first = block != jnp.pad(seen[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.sum(where & first, axis=1, dtype=jnp.int32)


def block_steps_left(state: Canvas, denoising_steps: int, block_size: int, origin: Array | int) -> Array:
    """int32 [B]: steps that the first unfinished block has left: later ones keep a share in proportion to their
    positions, and at least one step each."""
    here = in_block(state.undecided, block_size, origin)
    later, free = jnp.sum(state.undecided & ~here, axis=1), jnp.sum(~state.fixed, axis=1)
    reserved = later * denoising_steps // jnp.maximum(free, 1)
    reserved = jnp.maximum(reserved, num_blocks(state.undecided, block_size, origin) - 1)
    return jnp.maximum(denoising_steps - state.step - reserved, 1)
