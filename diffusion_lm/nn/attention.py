"""Who sees whom, and the attention that follows from it, without a mask of length squared.

A query sees a run of keys, first..last, of each source of keys. That says all that a reading needs: causal,
block-causal, bidirectional, a cache's filled slots, or a noisy block beside the clean blocks before it.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.nn.cache import LayerKV
from diffusion_lm.nn.dot import dot
from diffusion_lm.types import Bidirectional, BlockCausal, Causal, NoisyClean

Array = jax.Array
_CHUNK = 128  # queries that share one static window of keys
_KEEP_SCORES = 1024  # longer rows compute their scores anew in the backward pass
_HIDDEN = -1e30


@struct.dataclass
class Sight:
    """What each of L queries sees of one source of S keys.

    first, last     int32 [1 or B, L]: the run of key indices that it sees; empty where last < first
    query_segments  int32 [B, L], and key_segments [B, S]: only keys of its own document; None where there is one
    window          (query start, query stop) -> (key start, key stop), static: no query of that chunk sees beyond
    """

    first: Array
    last: Array
    query_segments: Array | None
    key_segments: Array | None
    window: Callable[[int, int], tuple[int, int]] = struct.field(pytree_node=False)

    def mask(self, queries: slice, keys: slice) -> Array:
        """bool [1 or B, queries, keys]."""
        index = jnp.arange(keys.start, keys.stop, dtype=jnp.int32)[None, None, :]
        seen = (self.first[:, queries, None] <= index) & (index <= self.last[:, queries, None])
        if self.query_segments is None:
            return seen
        return seen & (self.query_segments[:, queries, None] == self.key_segments[:, None, keys])


def sight_of_itself(reading: Causal | Bidirectional | BlockCausal, length: int, segments: Array | None) -> Sight:
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


def sights_of_noisy(block: int, length: int, segments: Array | None) -> tuple[Sight, Sight]:
    """A noisy half: what it sees of itself (its own block), and of the clean half (the blocks before its own).

    Chunks of queries must hold whole blocks: `chunk_size` sees to it.
    """
    at = jnp.arange(length, dtype=jnp.int32)[None]
    start_of_block = at // block * block
    both = {"query_segments": segments, "key_segments": segments}
    itself = Sight(
        first=start_of_block, last=start_of_block + block - 1, window=lambda start, stop: (start, stop), **both
    )
    clean = Sight(
        first=jnp.zeros_like(at),
        last=start_of_block - 1,
        window=lambda start, stop: (0, (stop - 1) // block * block),
        **both,
    )
    return itself, clean


def chunk_size(reading) -> int:
    """How many queries to take at a time: about 128, in whole blocks."""
    block = reading.block if isinstance(reading, NoisyClean | BlockCausal) else 1
    return block * max(1, _CHUNK // block)


def attend(q: Array, sources: tuple[tuple[LayerKV, Sight], ...], *, chunk: int, products: str) -> Array:
    """softmax(q k / sqrt(D)) v over all sources together: q [B, H, L, D] -> float32 [B, H, L, D]."""
    length = q.shape[2]
    parts = []
    for start in range(0, length, chunk):
        one = functools.partial(_attend_chunk, start=start, stop=min(start + chunk, length), products=products)
        parts.append((one if length <= _KEEP_SCORES else jax.checkpoint(one))(q, sources))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def _attend_chunk(q: Array, sources, *, start: int, stop: int, products: str) -> Array:
    batch, heads, _, width = q.shape
    kv_heads = sources[0][0].k.shape[1]
    q = q[:, :, start:stop].reshape(batch, kv_heads, heads // kv_heads, stop - start, width) / math.sqrt(width)
    scores, values = [], []
    for kv, sight in sources:
        keys = slice(*sight.window(start, stop))
        if keys.start == keys.stop:
            continue
        seen = kv.cut(keys.start, keys.stop)
        score = dot("bgrqd,bgdk->bgrqk", q, seen.k, products)
        scores.append(jnp.where(sight.mask(slice(start, stop), keys)[:, None, None], score, _HIDDEN))
        values.append(seen.v)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    mixed, at = 0.0, 0
    for value in values:
        mixed += dot("bgrqk,bgkd->bgrqd", weights[..., at : at + value.shape[2]], value, products)
        at += value.shape[2]
    return mixed.reshape(batch, heads, stop - start, width)
