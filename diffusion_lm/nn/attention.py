"""Attention for any pattern (`attention_patterns`), without a mask of length squared."""

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import AttentionPattern, KeyRange, Ranges, cache_key_range
from diffusion_lm.nn import cudnn
from diffusion_lm.nn.cache import CachedLayer, LayerKV
from diffusion_lm.nn.dot import dot
from diffusion_lm.sharding import cut, each_device, platform, ways_in_force

log = logging.getLogger(__name__)
Array = jax.Array
_CHUNK = 128  # queries that share one window of keys
_WINDOWS = 16  # windows of different widths: a row of more chunks scans several of them with one program
_KEEP_SCORES = 1024  # longer rows compute their scores anew in the backward pass
_HIDDEN = -1e30


def dot_product_attention(
    q: Array,
    new: LayerKV,
    pattern: AttentionPattern,
    ranges: Ranges,
    past: CachedLayer | None = None,
    *,
    compute_dtype: str,
    kernel: str = "auto",
    window: int = 0,
    whole_canvas: bool = False,
) -> Array:
    """softmax(q k / sqrt(D)) v over the keys that a pattern lets each query attend to.

    The program's size doesn't grow with L, and its memory grows with L, not with its square.

    Args:
        q: [B, H, L, D].
        new: the L positions' own keys and values; where past.slots is given, all that the cache holds.
        pattern: which positions attend to which, and
        ranges: its `key_ranges`.
        past: the layer's cache; with one, attention always runs in chunks.
        kernel: see `models.base.Execution.attention_kernel`.
        window: queries attend to keys less than this many positions away; 0 for no limit.
        whole_canvas: a canvas attends to all of itself, and the window counts from its first position.

    Returns:
        float32 [B, H, L, D].
    """
    canvas = bool(window) and whole_canvas and pattern.may_be_noisy
    if window:  # of a pattern with clean text in its row the first group is the canvas
        ranges = tuple(
            tuple(r.before_canvas(window) if canvas and not g else r.sliding(window) for r in group)
            for g, group in enumerate(ranges)
        )
    if (
        past is None
        and not canvas
        and (kernel == "splash" or (kernel == "auto" and platform() == "tpu" and compute_dtype == "bfloat16"))
    ):
        from diffusion_lm.nn import splash  # takes half a second to import

        return splash.splash_attention(q, new, pattern, ranges, compute_dtype=compute_dtype, window=window)
    length, groups = q.shape[2] // len(ranges), len(ranges)
    fused = past is None and kernel == "cudnn"
    kinds = pattern.kernels if fused and not window else (None,) * groups
    if fused:
        cudnn.check_devices()
        if None in kinds:
            _log_chunked(pattern)
    first = next((g for g, kind in enumerate(kinds) if kind), groups)  # kernels compute the last groups, if any
    found = (
        []
        if not first
        else [_in_chunks(q[:, :, : first * length], new, pattern, ranges[:first], past, compute_dtype, window, canvas)]
    )
    for g in range(first, groups):
        part, (own,) = q[:, :, g * length : (g + 1) * length], ranges[g]
        found.append(cudnn.cudnn_attention(part, _keys(new, own), kinds[g], own, compute_dtype=compute_dtype))
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=2)


@functools.cache
def _log_chunked(pattern: AttentionPattern) -> None:
    log.info(
        "exec.attention_kernel=cudnn computes plain causal or full attention: %s runs in chunks where not", pattern
    )


def _keys(kv: LayerKV, key_range: KeyRange) -> LayerKV:
    return kv if key_range.keys is None else kv.cut(*key_range.keys)


def _in_chunks(
    q: Array,
    new: LayerKV,
    pattern: AttentionPattern,
    ranges: Ranges,
    past: CachedLayer | None,
    compute_dtype: str,
    window: int,
    canvas: bool,
) -> Array:
    """Groups of queries [B, H, groups * L, D], each over its own sources of keys."""
    length = q.shape[2] // len(ranges)
    chunks = _chunked(q, len(ranges), pattern.granularity)
    found = []
    for g, (group, part) in enumerate(zip(ranges, jnp.split(chunks, len(ranges), axis=2), strict=True)):
        sources = tuple((_keys(new, r), r) for r in group)
        if past is not None and past.slots is None:
            index = jnp.arange(length, dtype=jnp.int32)[None] if group[0].index is None else group[0].index
            of_cache = cache_key_range(past.length, past.kv.slots, past.length[:, None] + index)
            if window:
                of_cache = of_cache.before_canvas(window) if canvas and not g else of_cache.sliding(window)
            sources = ((past.kv, of_cache), *sources)
        found.append(_attend(part, sources, length, compute_dtype))
    joined = found[0] if len(found) == 1 else jnp.concatenate(found, axis=2)
    batch, heads, _, _, width = joined.shape  # undo `_chunked`
    joined = joined.reshape(batch, heads, len(ranges), -1, width)[:, :, :, :length]
    return cut(joined.reshape(q.shape), "batch", "heads", "length", None)


def _chunked(q: Array, groups: int, multiple: int) -> Array:
    """Queries [B, H, groups * L, D] -> [B, H, n, c, D]: n chunks of c queries, a multiple of `multiple`, with zeros
    after each group's last query. Chunks are about _CHUNK long and nearly equal, so that few zeros are needed.

    Where a mesh cuts rows along their length, each device takes a part of every chunk: the end of a causal row attends
    to more than its beginning.
    """
    batch, heads, length, width = q.shape
    length, ways = length // groups, ways_in_force("length")
    ways = 1 if length % ways else ways
    unit = math.lcm(multiple, ways)
    units = -(-length // unit)
    count = -(-units // max(1, _CHUNK * ways // unit))
    size = min(unit * -(-units // count), length)
    q = jnp.pad(q.reshape(batch, heads, groups, length, width), ((0, 0),) * 3 + ((0, count * size - length), (0, 0)))
    return cut(q.reshape(batch, heads, groups * count, size, width), "batch", "heads", None, "length", None)


def _attend(q: Array, sources: tuple[tuple[LayerKV, KeyRange], ...], length: int, compute_dtype: str) -> Array:
    """`length` queries in chunks [B, H, n, c, D] over all sources of keys together."""
    count, size = q.shape[2:4]
    spans = [(i * size, min((i + 1) * size, length)) for i in range(count)]
    arrays, tree = jax.tree.flatten(tuple((kv, key_range.chunked(count, size)) for kv, key_range in sources))
    together = -(-count // _WINDOWS)  # neighbours share a window of keys, the widest that one of them needs
    groups = [range(first, min(first + together, count)) for first in range(0, count, together)]

    def here(q, *arrays):
        sources, parts = jax.tree.unflatten(tree, arrays), []
        for chunks, mine in zip(groups, jnp.split(q, [g.start for g in groups[1:]], axis=2), strict=True):
            some = [spans[i] for i in chunks]
            views = tuple(view for source in sources if (view := _view(*source, some)) is not None)
            parts.append(_attend_chunks(mine, views, chunks, compute_dtype, keep=length <= _KEEP_SCORES))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)

    if ways_in_force("length") == 1:
        return here(q, *arrays)
    # A device has a part of each chunk of queries, and all keys: segment_ids; first and last [n, B, c]; k and v.
    axes = {2: ("batch", None), 3: (None, "batch", "length"), 4: ("batch", "kv_heads", None, None)}
    return each_device(here, [("batch", "heads", None, "length", None), *(axes[a.ndim] for a in arrays)])(q, *arrays)


class _View(NamedTuple):
    """What some chunks attend to in one source: keys from index `start` on, each chunk `width` from its offset on."""

    kv: LayerKV
    segment_ids: Array | None
    key_range: KeyRange
    start: int
    width: int
    offsets: tuple[int, ...]

    def by_blocks(self, queries: int) -> bool:
        """Whether a chunk has as many queries as keys, in whole blocks of which each attends to exactly itself."""
        block_size = self.key_range.block_size
        whole = all((self.start + offset) % self.width == 0 for offset in self.offsets)
        return 0 < block_size < queries == self.width and queries % block_size == 0 and whole

    def keys(self, offset: int | Array) -> tuple[LayerKV, Array | None]:
        """One chunk's keys and values, and their segment_ids."""
        if self.width == self.kv.slots:
            return self.kv, self.segment_ids

        def some(a: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(a, offset, self.width, axis)

        kv = LayerKV(k=some(self.kv.k, 3), v=some(self.kv.v, 2))
        return kv, None if self.segment_ids is None else some(self.segment_ids, 1)


def _view(kv: LayerKV, key_range: KeyRange, spans: list[tuple[int, int]]) -> _View | None:
    """None where these chunks attend to no key of the source."""
    windows = [key_range.window(*span) for span in spans]
    width = max(stop - start for start, stop in windows)
    if not width:
        return None
    starts = [min(start, kv.slots - width) for start, _ in windows]
    first, stop = min(starts), max(starts) + width
    segment_ids = None if key_range.key_segment_ids is None else key_range.key_segment_ids[:, first:stop]
    return _View(kv.cut(first, stop), segment_ids, key_range, first, width, tuple(at - first for at in starts))


def _attend_chunks(q: Array, views: tuple[_View, ...], chunks: range, compute_dtype: str, *, keep: bool) -> Array:
    """Chunks [B, H, chunks, c, D], one after the other where there are several."""

    def one(q, ranges, offsets):
        return _attend_chunk(q, views, ranges, offsets, compute_dtype)

    def ranges_of(which: int | slice):
        ranges = [(v.key_range.first, v.key_range.last, v.key_range.query_segment_ids) for v in views]
        return jax.tree.map(lambda a: a[which], ranges)

    one = one if keep else jax.checkpoint(one, prevent_cse=len(chunks) == 1)
    if len(chunks) == 1:
        return one(jnp.squeeze(q, 2), ranges_of(chunks.start), [0 for _ in views])[:, :, None]
    some = slice(chunks.start, chunks.stop)
    offsets = [jnp.asarray(v.offsets, jnp.int32) for v in views]
    each = jnp.moveaxis(q, 2, 0), ranges_of(some), offsets
    return jnp.moveaxis(jax.lax.map(lambda chunk: one(*chunk), each), 0, 2)


def _attend_chunk(q: Array, views: tuple[_View, ...], ranges, offsets, compute_dtype: str) -> Array:
    """One chunk.

    Args:
        q: [B, H, c, D].
        ranges: for each view, first, last and segment_ids of these queries, [1 or B, c].
        offsets: for each view, where the chunk's window of keys begins.
    """
    batch, heads, size, width = q.shape
    kv_heads = views[0].kv.k.shape[1]
    q = q.reshape(batch, kv_heads, heads // kv_heads, size, width) / math.sqrt(width)
    scores, values, mixes = [], [], []
    for view, (first, last, query_segment_ids), offset in zip(views, ranges, offsets, strict=True):
        kv, segment_ids = view.keys(offset)
        if view.by_blocks(size):
            how = view.key_range.block_size, compute_dtype
            scores.append(_block_scores(q, kv.k, query_segment_ids, segment_ids, *how))
            mixes.append(_block_mix)
        else:
            index = (view.start + offset + jnp.arange(view.width, dtype=jnp.int32))[None, None]
            mask = (first[:, :, None] <= index) & (index <= last[:, :, None])
            if query_segment_ids is not None:
                mask &= query_segment_ids[:, :, None] == segment_ids[:, None]
            score = dot("bgrqd,bgdk->bgrqk", q, kv.k, compute_dtype)
            scores.append(jnp.where(mask[:, None, None], score, _HIDDEN))
            mixes.append(functools.partial(dot, "bgrqk,bgkd->bgrqd"))
        values.append(kv.v)
    # The softmax over all views, divided last: weights are neither joined nor cut, and the mixture alone is divided.
    largest = functools.reduce(jnp.maximum, [jax.lax.stop_gradient(score).max(-1, keepdims=True) for score in scores])
    weights = [jnp.exp(score - largest) for score in scores]
    mixed = sum(mix(part, value, compute_dtype) for part, mix, value in zip(weights, mixes, values, strict=True))
    mixed = mixed / sum(part.sum(-1, keepdims=True) for part in weights)
    return mixed.reshape(batch, heads, size, width)


def _block_scores(q: Array, k: Array, query_segment_ids, key_segment_ids, block_size: int, compute_dtype: str) -> Array:
    """Each block of queries [B, G, R, c, D] on its own keys [B, G, D, c]: [B, G, R, c, block]. (On all keys of the
    chunk there are many times as many scores, to be computed, masked, and thrown away.)"""
    k = jnp.moveaxis(k.reshape(*k.shape[:3], -1, block_size), 3, 2)
    score = dot("bgnrqd,bgndk->bgnrqk", _by_block(q, block_size), k, compute_dtype)
    if query_segment_ids is not None:
        queries, keys = (a.reshape(-1, k.shape[2], block_size) for a in (query_segment_ids, key_segment_ids))
        score = jnp.where((queries[..., None] == keys[:, :, None])[:, None, :, None], score, _HIDDEN)
    return jnp.moveaxis(score, 2, 3).reshape(*q.shape[:4], block_size)


def _block_mix(weights: Array, value: Array, compute_dtype: str) -> Array:
    """Each block's weights [B, G, R, c, block] of its own values [B, G, c, D]: [B, G, R, c, D]."""
    block_size = weights.shape[-1]
    values = value.reshape(*value.shape[:2], -1, block_size, value.shape[3])
    mixed = dot("bgnrqk,bgnkd->bgnrqd", _by_block(weights, block_size), values, compute_dtype)
    return jnp.moveaxis(mixed, 2, 3).reshape(*weights.shape[:4], value.shape[3])


def _by_block(a: Array, block_size: int) -> Array:
    """[B, G, R, c, D] -> [B, G, n, R, block, D]."""
    return jnp.moveaxis(a.reshape(*a.shape[:3], -1, block_size, a.shape[4]), 3, 2)
