"""Attention by the kernel that JAX has for TPUs, splash attention: scores never leave a core, and squares of queries
and keys of which nobody sees anybody aren't computed.

The squares follow from the same runs of keys that `nn.sight` speaks of; documents are told apart inside them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from diffusion_lm.nn.attention_mask import KeyRange, key_ranges
from diffusion_lm.nn.cache import LayerKV
from diffusion_lm.sharding import cut, each_device, platform, ways_in_force
from diffusion_lm.types import AttentionPattern, BlockDiffusionTraining

Array = jax.Array
_LANES = 128  # the kernel takes multiples of so many queries and keys
_SQUARE = 512  # queries, and keys, of a square at most
_NOBODY = -1  # the document of what only fills up squares


def splash_attention(
    q: Array, new: LayerKV, attention: AttentionPattern, ranges: tuple[KeyRange, ...], *, compute_dtype: str
) -> Array:
    """As `attention.dot_product_attention` for rows that see themselves alone: q [B, H, L, D] -> float32, alike.

    Where a mesh cuts rows along their length, each device takes a part of every chunk of queries, and so as much work
    as others. Off TPUs the kernel is interpreted, slowly: for tests.
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
    of_keys = _documents(attention, ranges, batch, length, more)
    kernel, tree = jax.tree.flatten(_kernel(attention, length, ways, square, platform() != "tpu"))

    def here(q, k, v, of_queries, of_keys, *kernel):
        each = jax.vmap(jax.tree.unflatten(tree, kernel))
        segment_ids = kernels.SegmentIds(q=of_queries.reshape(q.shape[0], -1), kv=of_keys)
        return each(q.reshape(*q.shape[:2], -1, width), jnp.swapaxes(k, 2, 3), v, segment_ids).reshape(q.shape)

    shared = ("batch", "kv_heads", None, None)
    axes = ("batch", "heads", None, "length", None), shared, shared, ("batch", None, "length"), ("batch", None)
    # Which squares there are is cut like the queries; what they look like inside isn't.
    axes += tuple((None, None, None) if a.dtype == bool else (None, "length", None) for a in kernel)
    of_queries = of_keys.reshape(batch, count, ways * square)
    found = each_device(here, axes)(q, k, v, of_queries, of_keys, *kernel)
    found = found.reshape(batch, heads, -1, width)[:, :, :length].astype(jnp.float32)
    return cut(found, "batch", "heads", "length", None)


def _documents(attention: AttentionPattern, ranges: tuple[KeyRange, ...], batch: int, length: int, more: int) -> Array:
    """int32 [B, length + more]: the document of each position."""
    found = ranges[0].query_segment_ids
    if found is None:
        found = jnp.zeros((batch, length), jnp.int32)
    elif isinstance(attention, BlockDiffusionTraining):
        found = jnp.concatenate([found, found], axis=1)
    return jnp.pad(found, ((0, 0), (0, more)), constant_values=_NOBODY)


@functools.lru_cache(maxsize=8, typed=True)  # typed: two readings without fields are equal otherwise
def _kernel(
    attention: AttentionPattern, length: int, ways: int, square: int, interpret: bool
) -> kernels.SplashAttentionKernel:
    """For queries chunked out to `ways` devices, `square` of each chunk; its arrays are numpy's."""
    whole = -(-length // (square * ways)) * square * ways
    order = np.arange(whole).reshape(-1, ways, square).swapaxes(0, 1).reshape(-1)
    first, last = (runs[:, order] for runs in _runs(attention, length, whole))
    sides = "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"
    sizes = dict.fromkeys(sides, square)
    layout = {"k_layout": kernels.QKVLayout.SEQ_MINOR}  # as `LayerKV` has them
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([_Seen(first, last)]),  # one for all heads
            block_sizes=kernels.BlockSizes(**sizes, **layout),
            head_shards=1,
            q_seq_shards=ways,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _runs(attention: AttentionPattern, length: int, whole: int) -> tuple[np.ndarray, np.ndarray]:
    """first and last, each [2, whole]: the two runs of keys that a query sees, of which one may be empty. What fills
    up squares sees itself: the kernel divides by what a query sees."""
    halves = 2 if isinstance(attention, BlockDiffusionTraining) else 1
    half = length // halves
    with jax.ensure_compile_time_eval():
        ranges = [(np.asarray(s.first)[0], np.asarray(s.last)[0]) for s in key_ranges(attention, half)]
    seen = [(first, np.minimum(last, half - 1)) for first, last in ranges]  # a last block may be cut short
    first, last = np.zeros((2, whole), np.int32), np.full((2, whole), -1, np.int32)
    first[0] = last[0] = np.arange(whole)
    first[0, :half], last[0, :half] = seen[0]
    if halves == 2:
        (before, up_to), of_clean = seen[1], seen[2]
        first[1, :half], last[1, :half] = half + before, half + up_to
        first[0, half:length], last[0, half:length] = (half + a for a in of_clean)
    return first, last


class _Seen(masks.Mask):
    """Who sees whom, by runs of keys: first and last [2, queries]. Made square by square, never as a whole; one in
    which all or none see is a single number, as nothing but that is asked of it."""

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
