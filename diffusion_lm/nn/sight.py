"""Who sees whom.

A query sees a run of keys, first..last, of each source of keys. That says all that a reading needs: causal,
block-causal, bidirectional, a cache's filled slots, a noisy block beside the clean blocks before it, or a canvas beside
the text that it stands behind.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.types import Bidirectional, BlockCausal, Causal, Forked, NoisyClean, Reading

Array = jax.Array


@struct.dataclass
class Sight:
    """What each of L queries sees of one source of S keys.

    first, last     int32 [1 or B, L]: the run of key indices that it sees; empty where last < first
    query_segments  int32 [B, L], and key_segments [B, S]: only keys of its own document; None where there is one
    window          (query start, query stop) -> (key start, key stop), static: no query of that chunk sees beyond
    block           static: of this source, blocks of so many positions see themselves and nothing else; 0: not so
    """

    first: Array
    last: Array
    query_segments: Array | None
    key_segments: Array | None
    window: Callable[[int, int], tuple[int, int]] = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False, default=0)

    def dealt(self, count: int, size: int) -> "Sight":
        """first, last and query_segments as `count` chunks, [count, 1 or B, size]; queries past L see nothing."""

        def chunks(a: Array, filler: int) -> Array:
            a = jnp.pad(a, ((0, 0), (0, count * size - a.shape[1])), constant_values=filler)
            return jnp.moveaxis(a.reshape(-1, count, size), 1, 0)

        segments = None if self.query_segments is None else chunks(self.query_segments, 0)
        return self.replace(first=chunks(self.first, 0), last=chunks(self.last, -1), query_segments=segments)


def sights_of(reading: Reading, length: int, segments: Array | None = None) -> tuple[Sight, ...]:
    """How rows of `length` positions in documents `segments` [B, L] see themselves; for NoisyClean the noisy half of
    itself and of the clean half, and the clean half of itself; for Forked all of the text, and all of the canvases."""
    if isinstance(reading, Forked):
        return _of_forked(reading)
    if isinstance(reading, NoisyClean):
        return *_of_noisy(reading.block, length, segments), _of_itself(reading.clean, length, segments)
    return (_of_itself(reading, length, segments),)


def in_documents(reading: Reading, sights: tuple[Sight, ...]) -> Array | None:
    """bool [B, L]: which positions (for NoisyClean, of both halves) belong to a document; None where all do."""
    segments = sights[0].query_segments
    if segments is None:
        return None
    return jnp.concatenate([segments, segments], axis=1) > 0 if isinstance(reading, NoisyClean) else segments > 0


def _of_itself(reading: Causal | Bidirectional | BlockCausal, length: int, segments: Array | None) -> Sight:
    """A row that reads itself."""
    at = jnp.arange(length, dtype=jnp.int32)[None]
    if isinstance(reading, Bidirectional):
        last, window = jnp.full_like(at, length - 1), lambda start, stop: (0, length)
    else:
        block = reading.block if isinstance(reading, BlockCausal) else 1
        last, window = at // block * block + block - 1, lambda start, stop: (0, min(length, -(-stop // block) * block))
    return Sight(first=jnp.zeros_like(at), last=last, query_segments=segments, key_segments=segments, window=window)


def sight_of_cache(length: Array, slots: int, queries: int) -> Sight:
    """Rows [B] that see their cache's filled slots: length int32 [B]."""
    last = jnp.broadcast_to(length[:, None] - 1, (length.shape[0], queries))
    return Sight(
        first=jnp.zeros_like(last),
        last=last,
        query_segments=None,
        key_segments=None,
        window=lambda start, stop: (0, slots),
    )


def _of_noisy(block: int, length: int, segments: Array | None) -> tuple[Sight, Sight]:
    """A noisy half: what it sees of itself (its own block), and of the clean half (the blocks before its own).

    Chunks of queries must hold whole blocks: `attention._dealt` sees to it.
    """
    at = jnp.arange(length, dtype=jnp.int32)[None]
    start_of_block = at // block * block
    both = {"query_segments": segments, "key_segments": segments}
    itself = Sight(
        first=start_of_block,
        last=start_of_block + block - 1,
        window=lambda start, stop: (start, stop),
        block=block,
        **both,
    )
    clean = Sight(
        first=jnp.zeros_like(at),
        last=start_of_block - 1,
        window=lambda start, stop: (0, (stop - 1) // block * block),
        **both,
    )
    return itself, clean


def _of_forked(reading: Forked) -> tuple[Sight, Sight]:
    """What text and canvases see of the text, and of the canvases. Both are short: all of each is one window."""
    text = jnp.arange(reading.text, dtype=jnp.int32)
    number = jnp.repeat(text, reading.canvas)
    start, nothing = number * reading.canvas, jnp.zeros_like(text)

    def sight(first: list[Array], last: list[Array], width: int) -> Sight:
        first, last = jnp.concatenate(first)[None], jnp.concatenate(last)[None]
        return Sight(first, last, query_segments=None, key_segments=None, window=lambda start, stop: (0, width))

    return (
        sight([nothing, 0 * number], [text, number], reading.text),
        sight([nothing, start], [nothing - 1, start + reading.canvas - 1], reading.text * reading.canvas),
    )
