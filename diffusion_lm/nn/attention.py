"""Attention that follows from who sees whom (`nn.sight`), without a mask of length squared."""

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.nn import cudnn
from diffusion_lm.nn.cache import LayerKV, Past
from diffusion_lm.nn.dot import dot
from diffusion_lm.nn.sight import Sight, sight_of_cache
from diffusion_lm.sharding import cut, each_device, platform, ways_in_force
from diffusion_lm.types import Bidirectional, BlockCausal, Causal, Forked, NoisyClean, Reading

log = logging.getLogger(__name__)
Array = jax.Array
_CHUNK = 128  # queries that share one window of keys
_WINDOWS = 16  # windows of different widths: a row of more chunks scans several of them with one program
_KEEP_SCORES = 1024  # longer rows compute their scores anew in the backward pass
_HIDDEN = -1e30


def attend(
    q: Array,
    new: LayerKV,
    reading: Reading,
    sights: tuple[Sight, ...],
    past: Past | None = None,
    *,
    products: str,
    by: str = "auto",
) -> Array:
    """softmax(q k / sqrt(D)) v over all that a reading lets each query see: q [B, H, L, D] -> float32, alike.

    new: the L positions' own keys and values (or, where past.slots says which they are, all that the cache holds);
    sights: how they are seen, for NoisyClean the noisy half's of itself and of the clean half, and the clean half's;
    for Forked, how the text and how the canvases are.
    by: see `Architecture.attention`; behind a cache, where alone Forked stands, it is always chunks.
    A program's size doesn't grow with L, and what it keeps grows with L and not its square.
    """
    if past is None and (by == "splash" or (by == "auto" and platform() == "tpu" and products == "bfloat16")):
        from diffusion_lm.nn import splash  # half a second, of which only those who use it should know

        return splash.attend(q, new, reading, sights, products=products)
    if past is None and by == "cudnn":
        return _attend_cudnn(q, new, reading, sights, products)
    return _attend_chunked(q, new, reading, sights, past, products)


def _attend_cudnn(q: Array, new: LayerKV, reading: Reading, sights: tuple[Sight, ...], products: str) -> Array:
    """What cuDNN can read goes there, the rest by chunks."""
    cudnn.check_devices()
    if isinstance(reading, Causal | Bidirectional):
        return cudnn.attend(q, new, reading, sights[0], products=products)
    _say_chunked(reading)
    if not (isinstance(reading, NoisyClean) and isinstance(reading.clean, Causal)):
        return _attend_chunked(q, new, reading, sights, None, products)
    half = q.shape[2] // 2
    noisy, clean = new.cut(0, half), new.cut(half, 2 * half)
    itself, before, of_clean = sights
    lower = cudnn.attend(q[:, :, half:], clean, reading.clean, of_clean, products=products)
    blocks = BlockCausal(reading.block)
    chunks = _attend(_dealt(q[:, :, :half], blocks), ((noisy, itself), (clean, before)), half, products)
    return jnp.concatenate([_joined(chunks, blocks, half), lower], axis=2)


@functools.cache
def _say_chunked(reading: Reading) -> None:
    log.info("model.attention=cudnn reads no blocks: of %s, what is read by blocks goes by chunks", reading)


def _attend_chunked(
    q: Array, new: LayerKV, reading: Reading, sights: tuple[Sight, ...], past: Past | None, products: str
) -> Array:
    length, chunks = q.shape[2], _dealt(q, reading)
    if isinstance(reading, NoisyClean):
        half, count = length // 2, chunks.shape[2] // 2
        noisy, clean = new.cut(0, half), new.cut(half, length)
        itself, before, of_clean = sights
        upper = _attend(chunks[:, :, :count], ((noisy, itself), (clean, before)), half, products)
        lower = _attend(chunks[:, :, count:], ((clean, of_clean),), half, products)
        return _joined(jnp.concatenate([upper, lower], axis=2), reading, length)
    sources = ((new, sights[0]),)
    if isinstance(reading, Forked):
        sources = tuple(zip((new.cut(0, reading.text), new.cut(reading.text, length)), sights, strict=True))
    if past is not None and past.slots is None:
        sources = ((past.kv, sight_of_cache(past.length, past.kv.slots, length)), *sources)
    return _joined(_attend(chunks, sources, length, products), reading, length)


def _dealt(q: Array, reading: Reading) -> Array:
    """Queries [B, H, L, D] -> [B, H, n, c, D]: n chunks of c, about 128 and whole blocks; zeros fill up the last.
    Both halves of NoisyClean are dealt alike, the noisy one's chunks first.

    Where a mesh cuts rows along their length, each device takes a part of every chunk, and so as much work as others:
    a causal row's end sees more than its beginning.
    """
    halves, block = _halves(reading), reading.block if isinstance(reading, NoisyClean | BlockCausal) else 1
    batch, heads, length, width = q.shape
    length //= halves
    count, size = _deal(length, block)
    q = jnp.pad(q.reshape(batch, heads, halves, length, width), ((0, 0),) * 3 + ((0, count * size - length), (0, 0)))
    return cut(q.reshape(batch, heads, halves * count, size, width), "batch", "heads", None, "length", None)


def _joined(chunks: Array, reading: Reading, length: int) -> Array:
    """What `_dealt` did to [B, H, length, D], undone."""
    batch, heads, _, _, width = chunks.shape
    parts = chunks.reshape(batch, heads, _halves(reading), -1, width)[:, :, :, : length // _halves(reading)]
    return cut(parts.reshape(batch, heads, length, width), "batch", "heads", "length", None)


def _halves(reading: Reading) -> int:
    return 2 if isinstance(reading, NoisyClean) else 1


def _deal(length: int, block: int) -> tuple[int, int]:
    """How many chunks, and their size: whole blocks, and nearly equal, so that little is filled up."""
    ways = ways_in_force("length")
    ways = 1 if length % ways else ways
    unit = math.lcm(block, ways)
    units = -(-length // unit)
    count = -(-units // max(1, _CHUNK * ways // unit))
    return count, min(unit * -(-units // count), length)


def _attend(q: Array, sources: tuple[tuple[LayerKV, Sight], ...], length: int, products: str) -> Array:
    """`length` queries in chunks [B, H, n, c, D] over all sources together."""
    count, size = q.shape[2:4]
    spans = [(i * size, min((i + 1) * size, length)) for i in range(count)]
    dealt = tuple((kv, sight.dealt(count, size)) for kv, sight in sources)
    arrays, tree = jax.tree.flatten(dealt)

    def here(q, *arrays):
        return _attend_all(q, jax.tree.unflatten(tree, arrays), spans, products, keep=length <= _KEEP_SCORES)

    if ways_in_force("length") == 1:
        return here(q, *arrays)
    return each_device(here, [("batch", "heads", None, "length", None), *map(_axes, arrays)])(q, *arrays)


def _axes(array: Array) -> tuple[str | None, ...]:
    """Each device has a part of each chunk of queries, and all keys: first and last [n, B, c], k and v, segments."""
    return {2: ("batch", None), 3: (None, "batch", "length"), 4: ("batch", "kv_heads", None, None)}[array.ndim]


def _attend_all(q: Array, sources, spans: list[tuple[int, int]], products: str, *, keep: bool) -> Array:
    """Where there are many chunks, those that stand side by side share a window of keys, the widest that one needs."""
    count = len(spans)
    together = -(-count // _WINDOWS)
    parts = []
    for first in range(0, count, together):
        chunks = range(first, min(first + together, count))
        some = [spans[i] for i in chunks]
        views = tuple(view for source in sources if (view := _view(*source, some)) is not None)
        parts.append(_attend_chunks(q, views, chunks, products, keep=keep))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


class _View(NamedTuple):
    """What some chunks see of one source: keys from index `start` on, of which each sees `width` from its offset on."""

    kv: LayerKV
    segments: Array | None
    sight: Sight
    start: int
    width: int
    offsets: tuple[int, ...]

    def by_blocks(self, queries: int) -> bool:
        """Whether these are as many queries as keys, in whole blocks that each see themselves."""
        block = self.sight.block
        whole = all((self.start + offset) % self.width == 0 for offset in self.offsets)
        return 0 < block < queries == self.width and queries % block == 0 and whole

    def keys(self, offset: int | Array) -> tuple[LayerKV, Array | None]:
        """One chunk's keys and values, and their segments."""
        if self.width == self.kv.slots:
            return self.kv, self.segments

        def some(a: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(a, offset, self.width, axis)

        kv = LayerKV(k=some(self.kv.k, 3), v=some(self.kv.v, 2))
        return kv, None if self.segments is None else some(self.segments, 1)


def _view(kv: LayerKV, sight: Sight, spans: list[tuple[int, int]]) -> _View | None:
    """None where there is nothing to be seen."""
    windows = [sight.window(*span) for span in spans]
    width = max(stop - start for start, stop in windows)
    if not width:
        return None
    starts = [min(start, kv.slots - width) for start, _ in windows]
    first, stop = min(starts), max(starts) + width
    segments = None if sight.key_segments is None else sight.key_segments[:, first:stop]
    return _View(kv.cut(first, stop), segments, sight, first, width, tuple(at - first for at in starts))


def _attend_chunks(q: Array, views: tuple[_View, ...], chunks: range, products: str, *, keep: bool) -> Array:
    """Chunks [B, H, chunks, c, D], one after the other where there are several."""

    def one(q, sights, offsets):
        return _attend_chunk(q, views, sights, offsets, products)

    def seen(which: int | slice):
        return [(v.sight.first[which], v.sight.last[which], _maybe(v.sight.query_segments, which)) for v in views]

    one = one if keep else jax.checkpoint(one, prevent_cse=len(chunks) == 1)
    if len(chunks) == 1:
        return one(q[:, :, chunks.start], seen(chunks.start), [0 for _ in views])[:, :, None]
    some = slice(chunks.start, chunks.stop)
    offsets = [jnp.asarray(v.offsets, jnp.int32) for v in views]
    each = jnp.moveaxis(q[:, :, some], 2, 0), seen(some), offsets
    return jnp.moveaxis(jax.lax.map(lambda chunk: one(*chunk), each), 0, 2)


def _maybe(a: Array | None, which: int | slice) -> Array | None:
    return None if a is None else a[which]


def _attend_chunk(q: Array, views: tuple[_View, ...], sights, offsets, products: str) -> Array:
    """q [B, H, c, D]; of each view, first, last and segments [1 or B, c] of these queries, and the window's offset."""
    batch, heads, size, width = q.shape
    kv_heads = views[0].kv.k.shape[1]
    q = q.reshape(batch, kv_heads, heads // kv_heads, size, width) / math.sqrt(width)
    scores, values, mixes = [], [], []
    for view, sight, offset in zip(views, sights, offsets, strict=True):
        kv, segments = view.keys(offset)
        if view.by_blocks(size):
            scores.append(_scores_by_block(q, kv.k, sight[2], segments, view.sight.block, products))
            mixes.append(_mixed_by_block)
        else:
            index = view.start + offset + jnp.arange(view.width, dtype=jnp.int32)
            score = dot("bgrqd,bgdk->bgrqk", q, kv.k, products)
            scores.append(jnp.where(_mask(*sight, index, segments)[:, None, None], score, _HIDDEN))
            mixes.append(functools.partial(dot, "bgrqk,bgkd->bgrqd"))
        values.append(kv.v)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    mixed, at = 0.0, 0
    for score, mix, value in zip(scores, mixes, values, strict=True):
        mixed += mix(weights[..., at : at + score.shape[-1]], value, products)
        at += score.shape[-1]
    return mixed.reshape(batch, heads, size, width)


def _scores_by_block(
    q: Array, k: Array, query_segments: Array | None, key_segments: Array | None, block: int, products: str
) -> Array:
    """Each block of queries [B, G, R, c, D] on its own keys [B, G, D, c]: [B, G, R, c, block]. (A chunk's keys all at
    once are many times as many scores, to be made, masked, and thrown away.)"""
    k = jnp.moveaxis(k.reshape(*k.shape[:3], -1, block), 3, 2)
    score = dot("bgnrqd,bgndk->bgnrqk", _by_block(q, block), k, products)
    if query_segments is not None:
        same = query_segments.reshape(-1, k.shape[2], block, 1) == key_segments.reshape(-1, k.shape[2], 1, block)
        score = jnp.where(same[:, None, :, None], score, _HIDDEN)
    return jnp.moveaxis(score, 2, 3).reshape(*q.shape[:4], block)


def _mixed_by_block(weights: Array, value: Array, products: str) -> Array:
    """Each block's weights [B, G, R, c, block] of its own values [B, G, c, D]: [B, G, R, c, D]."""
    block = weights.shape[-1]
    values = value.reshape(*value.shape[:2], -1, block, value.shape[3])
    mixed = dot("bgnrqk,bgnkd->bgnrqd", _by_block(weights, block), values, products)
    return jnp.moveaxis(mixed, 2, 3).reshape(*weights.shape[:4], value.shape[3])


def _by_block(a: Array, block: int) -> Array:
    """[B, G, R, c, D] -> [B, G, n, R, block, D]."""
    return jnp.moveaxis(a.reshape(*a.shape[:3], -1, block, a.shape[4]), 3, 2)


def _mask(first: Array, last: Array, query_segments: Array | None, index: Array, key_segments: Array | None) -> Array:
    """bool [1 or B, queries, keys]: first, last [1 or B, queries] and the indices of the keys."""
    index = index[None, None]
    seen = (first[:, :, None] <= index) & (index <= last[:, :, None])
    return seen if query_segments is None else seen & (query_segments[:, :, None] == key_segments[:, None])
