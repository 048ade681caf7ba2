"""Who sees whom.

A query sees a run of keys, first..last, of each source of keys. That says all that a reading needs: causal,
block-causal, bidirectional, a cache's filled slots, a noisy block beside the clean blocks before it, or a canvas beside
the text that it stands behind.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.types import AttentionPattern, BlockCausal, BlockDiffusionTraining, Causal, DraftAndVerify, Full

Array = jax.Array


@struct.dataclass
class KeyRange:
    """What each of L queries sees of one source of S keys.

    first, last     int32 [1 or B, L]: the run of key indices that it sees; empty where last < first
    query_segment_ids  int32 [B, L], and key_segment_ids [B, S]: only keys of its own document; None where there is one
    window          (query start, query stop) -> (key start, key stop), static: no query of that chunk sees beyond
    block           static: of this source, blocks of so many positions see themselves and nothing else; 0: not so
    """

    first: Array
    last: Array
    query_segment_ids: Array | None
    key_segment_ids: Array | None
    window: Callable[[int, int], tuple[int, int]] = struct.field(pytree_node=False)
    block_size: int = struct.field(pytree_node=False, default=0)

    def chunked(self, count: int, size: int) -> "KeyRange":
        """first, last and query_segment_ids as `count` chunks, [count, 1 or B, size]; queries past L see nothing."""

        def chunks(a: Array, filler: int) -> Array:
            a = jnp.pad(a, ((0, 0), (0, count * size - a.shape[1])), constant_values=filler)
            return jnp.moveaxis(a.reshape(-1, count, size), 1, 0)

        segment_ids = None if self.query_segment_ids is None else chunks(self.query_segment_ids, 0)
        return self.replace(first=chunks(self.first, 0), last=chunks(self.last, -1), query_segment_ids=segment_ids)


def key_ranges(attention: AttentionPattern, length: int, segment_ids: Array | None = None) -> tuple[KeyRange, ...]:
    """How rows of `length` positions in documents `segment_ids` [B, L] see themselves; for BlockDiffusionTraining the noisy half of
    itself and of the clean half, and the clean half of itself; for DraftAndVerify all of the text, and all of the canvases."""
    if isinstance(attention, DraftAndVerify):
        return _of_forked(attention)
    if isinstance(attention, BlockDiffusionTraining):
        return *_of_noisy(attention.block_size, length, segment_ids), _of_itself(attention.clean, length, segment_ids)
    return (_of_itself(attention, length, segment_ids),)


def valid_mask(attention: AttentionPattern, ranges: tuple[KeyRange, ...]) -> Array | None:
    """bool [B, L]: which positions (for BlockDiffusionTraining, of both halves) belong to a document; None where all do."""
    segment_ids = ranges[0].query_segment_ids
    if segment_ids is None:
        return None
    return (
        jnp.concatenate([segment_ids, segment_ids], axis=1) > 0
        if isinstance(attention, BlockDiffusionTraining)
        else segment_ids > 0
    )


def _of_itself(attention: Causal | Full | BlockCausal, length: int, segment_ids: Array | None) -> KeyRange:
    """A row that reads itself."""
    at = jnp.arange(length, dtype=jnp.int32)[None]
    if isinstance(attention, Full):
        last, window = jnp.full_like(at, length - 1), lambda start, stop: (0, length)
    else:
        block_size = attention.block_size if isinstance(attention, BlockCausal) else 1
        last, window = (
            at // block_size * block_size + block_size - 1,
            lambda start, stop: (0, min(length, -(-stop // block_size) * block_size)),
        )
    return KeyRange(
        first=jnp.zeros_like(at), last=last, query_segment_ids=segment_ids, key_segment_ids=segment_ids, window=window
    )


def cache_key_range(length: Array, slots: int, queries: int) -> KeyRange:
    """Rows [B] that see their cache's filled slots: length int32 [B]."""
    last = jnp.broadcast_to(length[:, None] - 1, (length.shape[0], queries))
    return KeyRange(
        first=jnp.zeros_like(last),
        last=last,
        query_segment_ids=None,
        key_segment_ids=None,
        window=lambda start, stop: (0, slots),
    )


def _of_noisy(block_size: int, length: int, segment_ids: Array | None) -> tuple[KeyRange, KeyRange]:
    """A noisy half: what it sees of itself (its own block), and of the clean half (the blocks before its own).

    Chunks of queries must hold whole blocks: `attention._chunked` sees to it.
    """
    at = jnp.arange(length, dtype=jnp.int32)[None]
    start_of_block = at // block_size * block_size
    both = {"query_segment_ids": segment_ids, "key_segment_ids": segment_ids}
    itself = KeyRange(
        first=start_of_block,
        last=start_of_block + block_size - 1,
        window=lambda start, stop: (start, stop),
        block_size=block_size,
        **both,
    )
    clean = KeyRange(
        first=jnp.zeros_like(at),
        last=start_of_block - 1,
        window=lambda start, stop: (0, (stop - 1) // block_size * block_size),
        **both,
    )
    return itself, clean


def _of_forked(attention: DraftAndVerify) -> tuple[KeyRange, KeyRange]:
    """What text and canvases see of the text, and of the canvases. Both are short: all of each is one window."""
    text = jnp.arange(attention.text, dtype=jnp.int32)
    number = jnp.repeat(text, attention.canvas)
    start, nothing = number * attention.canvas, jnp.zeros_like(text)

    def key_range(first: list[Array], last: list[Array], width: int) -> KeyRange:
        first, last = jnp.concatenate(first)[None], jnp.concatenate(last)[None]
        return KeyRange(
            first, last, query_segment_ids=None, key_segment_ids=None, window=lambda start, stop: (0, width)
        )

    return (
        key_range([nothing, 0 * number], [text, number], attention.text),
        key_range([nothing, start], [nothing - 1, start + attention.canvas - 1], attention.text * attention.canvas),
    )
