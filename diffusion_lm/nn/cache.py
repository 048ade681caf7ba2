"""The key-value cache. `append` and `rewrite` write one, `truncate` forgets, `resize` resizes: nobody else touches it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.nn.dot import dot

Array = jax.Array


class LayerKV(struct.PyTreeNode):
    """One layer's keys [B, G, D, S] and values [B, G, S, D]: laid out so that attention's products copy neither."""

    k: Array
    v: Array

    def cut(self, start: int, stop: int) -> "LayerKV":
        """Positions start..stop-1."""
        return LayerKV(k=self.k[..., start:stop], v=self.v[:, :, start:stop])

    @property
    def slots(self) -> int:
        return self.v.shape[2]


@struct.dataclass
class KVCache:
    """What a network has read of each row: slots 0..length-1 are filled, the others must not be looked at.

    layers  one LayerKV of S slots a layer (apart, not stacked: slicing a stack in a decoding loop copies it)
    length  int32 [B]
    """

    layers: tuple[LayerKV, ...]
    length: Array

    @property
    def slots(self) -> int:
        return self.layers[0].slots


class CachedLayer(NamedTuple):
    """What one layer finds in a cache: kv, of which length[b] slots are filled; and, where a pass reads positions
    again, their slots int32 [B, L]: then all slots are seen, these as the pass reads them."""

    kv: LayerKV
    length: Array
    slots: Array | None


def empty(*, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> KVCache:
    """A cache in which nothing has been read."""

    k, v = (batch, kv_heads, head_dim, slots), (batch, kv_heads, slots, head_dim)
    return KVCache(
        layers=tuple(LayerKV(k=jnp.zeros(k, dtype), v=jnp.zeros(v, dtype)) for _ in range(layers)),
        length=jnp.zeros(batch, jnp.int32),
    )


def append(cache: KVCache, new: tuple[LayerKV, ...], count: Array) -> KVCache:
    """Adds the first count[b] of T new positions to row b.

    The caller sees to it that length + T <= S for every row: all T are written, and those past count are overwritten
    by the next append. XLA would clamp a write past the end onto older slots.
    """

    def write(old: Array, add: Array, axis: int) -> Array:
        def one(row, piece, at):
            return jax.lax.dynamic_update_slice_in_dim(row, piece, at, axis)

        return jax.vmap(one)(old, add.astype(old.dtype), cache.length)

    layers = tuple(
        LayerKV(k=write(o.k, n.k, axis=2), v=write(o.v, n.v, axis=1)) for o, n in zip(cache.layers, new, strict=True)
    )
    return KVCache(layers=layers, length=cache.length + count)


def scatter(old: LayerKV, new: LayerKV, slots: Array) -> LayerKV:
    """One layer with new keys and values of W positions in slots int32 [B, W] of S; an index of S goes nowhere.

    A row's slots differ. With W = S, its i-th is i or S: what is new stands in its place.
    """
    if slots.shape[1] == old.slots:
        k, v, here = new.k, new.v, slots < old.slots
    else:
        # A product with ones and zeros moves them exactly; a scatter takes several times as long.
        index = jnp.arange(old.slots, dtype=jnp.int32)[None, None]
        there = slots[..., None] == index
        here = jnp.any(there, axis=1)
        k = dot("bgdw,bws->bgds", new.k, there, old.k.dtype.name)
        v = dot("bws,bgwd->bgsd", there, new.v, old.v.dtype.name)
    return LayerKV(
        k=jnp.where(here[:, None, None], k.astype(old.k.dtype), old.k),
        v=jnp.where(here[:, None, :, None], v.astype(old.v.dtype), old.v),
    )


def truncate(cache: KVCache, count: Array) -> KVCache:
    """Forgets the last count[b] positions of row b, at most all."""
    return cache.replace(length=cache.length - count)


def resize(cache: KVCache, rows: Array, slots: int | None = None) -> KVCache:
    """The chosen rows, int32 [n], with `slots` slots (None: as many). ValueError for fewer than there are."""
    more = 0 if slots is None else slots - cache.slots
    if more < 0:
        raise ValueError(f"a cache of {cache.slots} slots can't be refitted to {slots}: what it has read would be lost")

    def one(layer: LayerKV) -> LayerKV:
        k, v = jnp.take(layer.k, rows, axis=0), jnp.take(layer.v, rows, axis=0)
        return LayerKV(
            k=jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, more))), v=jnp.pad(v, ((0, 0), (0, 0), (0, more), (0, 0)))
        )

    return KVCache(layers=tuple(one(layer) for layer in cache.layers), length=jnp.take(cache.length, rows))
