"""Attention by JAX's kernel for TPUs, splash attention: scores never leave a core, and squares of queries and keys in
which no query attends to any key aren't computed.

The squares follow from the pattern's key ranges; documents are masked inside them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from diffusion_lm.attention_patterns import AttentionPattern, Ranges
from diffusion_lm.nn.cache import LayerKV
from diffusion_lm.sharding import cut, each_device, platform, ways_in_force

Array = jax.Array
_LANES = 128  # the kernel needs multiples of so many queries and keys
_SQUARE = 512  # queries, and keys, of a square at most
_NOBODY = -1  # the document of what only fills up squares


def splash_attention(
    q: Array, new: LayerKV, pattern: AttentionPattern, ranges: Ranges, *, compute_dtype: str, window: int = 0
) -> Array:
    """As `attention.dot_product_attention` without a cache: q [B, H, L, D] -> float32, alike.

    Where a mesh cuts rows along their length, each device takes a part of every chunk of queries, and so as much work
    as the others. Off TPUs the kernel is interpreted, slowly: for tests.
    """
    batch, heads, length, width = q.shape
    ways = ways_in_force("length")
    square = min(_SQUARE, _LANES * -(-length // (_LANES * ways)))
    count = -(-length // (square * ways))
    more = count * square * ways - length
    q, k, v = (a.astype(compute_dtype) for a in (q / math.sqrt(width), new.k, new.v))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, more), (0, 0))).reshape(batch, heads, count, ways * square, width)
    q = cut(q, "batch", "heads", None, "length", None)
    k, v = jnp.pad(k, ((0, 0),) * 3 + ((0, more),)), jnp.pad(v, ((0, 0),) * 2 + ((0, more), (0, 0)))
    of_keys = _documents(ranges, batch, length, more)
    kernel, tree = jax.tree.flatten(_kernel(pattern, length, ways, square, platform() != "tpu", window))

    def here(q, k, v, of_queries, of_keys, *kernel):
        each = jax.vmap(jax.tree.unflatten(tree, kernel))
        segment_ids = kernels.SegmentIds(q=of_queries.reshape(q.shape[0], -1), kv=of_keys)
        return each(q.reshape(*q.shape[:2], -1, width), jnp.swapaxes(k, 2, 3), v, segment_ids).reshape(q.shape)

    shared = ("batch", "kv_heads", None, None)
    axes = ("batch", "heads", None, "length", None), shared, shared, ("batch", None, "length"), ("batch", None)
    # The list of squares is cut like the queries; their masks aren't.
    axes += tuple((None, None, None) if a.dtype == bool else (None, "length", None) for a in kernel)
    of_queries = of_keys.reshape(batch, count, ways * square)
    found = each_device(here, axes)(q, k, v, of_queries, of_keys, *kernel)
    found = found.reshape(batch, heads, -1, width)[:, :, :length].astype(jnp.float32)
    return cut(found, "batch", "heads", "length", None)


def _documents(ranges: Ranges, batch: int, length: int, more: int) -> Array:
    """int32 [B, length + more]: the document of each position."""
    found = [group[0].query_segment_ids for group in ranges]
    found = jnp.zeros((batch, length), jnp.int32) if found[0] is None else jnp.concatenate(found, axis=1)
    return jnp.pad(found, ((0, 0), (0, more)), constant_values=_NOBODY)


@functools.lru_cache(maxsize=8)
def _kernel(
    pattern: AttentionPattern, length: int, ways: int, square: int, interpret: bool, window: int = 0
) -> kernels.SplashAttentionKernel:
    """For queries in chunks of `square` on each of `ways` devices; its arrays are numpy's."""
    whole = -(-length // (square * ways)) * square * ways
    order = np.arange(whole).reshape(-1, ways, square).swapaxes(0, 1).reshape(-1)
    first, last = (runs[:, order] for runs in _runs(pattern, length, whole, window))
    sides = "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"
    sizes = dict.fromkeys(sides, square)
    layout = {"k_layout": kernels.QKVLayout.SEQ_MINOR}  # as `LayerKV` has them
    with jax.core.eval_context():
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([_Seen(first, last)]),  # one for all heads
            block_sizes=kernels.BlockSizes(**sizes, **layout),
            head_shards=1,
            q_seq_shards=ways,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _runs(pattern: AttentionPattern, length: int, whole: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """first and last, each [n, whole]: the runs of keys that each query attends to, some of them empty. What fills up
    squares attends to itself: the kernel divides by the sum of weights."""
    with jax.core.eval_context():
        part = length // len(pattern.kernels)
        groups = pattern.key_ranges(part)
        most = max(len(group) for group in groups)
        first, last = np.zeros((most, whole), np.int32), np.full((most, whole), -1, np.int32)
        first[0] = last[0] = np.arange(whole)
        for g, group in enumerate(groups):
            for i, r in enumerate(group):
                r, (start, stop) = r.sliding(window) if window else r, r.keys or (0, length)
                at = slice(g * part, (g + 1) * part)
                first[i, at] = start + np.asarray(r.first)[0]
                last[i, at] = np.minimum(start + np.asarray(r.last)[0], stop - 1)  # a last block may be cut short
    return first, last


class _Seen(masks.Mask):
    """Which query attends to which key, by runs of keys: first and last [n, queries]. Computed square by square, never
    as a whole. A square of all True or all False is a single number: the kernel needs no more."""

    def __init__(self, first: np.ndarray, last: np.ndarray):
        self._first, self._last = first, last

    @property
    def shape(self) -> tuple[int, int]:
        return (self._first.shape[1],) * 2

    def __getitem__(self, square: tuple[slice, slice]) -> np.ndarray:
        queries, keys = square
        first, last = self._first[:, queries], self._last[:, queries]
        if np.all(np.any((first <= keys.start) & (keys.stop <= last + 1), axis=0)):
            return np.ones((1, 1), bool)
        if not np.any((first < keys.stop) & (keys.start <= last) & (first <= last)):
            return np.zeros((1, 1), bool)
        index = np.arange(keys.start, keys.stop)[None, None]
        return np.any((first[..., None] <= index) & (index <= last[..., None]), axis=0)
