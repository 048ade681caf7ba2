"""The key-value cache. `append` and `scatter` write it, `truncate` and `resize` change its size: no other file does."""

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
    """Keys and values of each row's first positions: slots 0..length-1 are filled, the others are never used.

    Args:
        layers: one LayerKV of S slots a layer (not stacked: slicing a stack in a decoding loop copies it).
        length: int32 [B].
        hidden: [B, S, E], the last hidden states, for a head that predicts the next token; None for other networks.
    """

    layers: tuple[LayerKV, ...]
    length: Array
    hidden: Array | None = None

    @property
    def slots(self) -> int:
        return self.layers[0].slots


class CachedLayer(NamedTuple):
    """One layer of a cache: kv, of which length[b] slots are filled. Where a pass computes positions anew, `slots`
    int32 [B, L] are theirs: all slots are then attended to, these with their new keys and values."""

    kv: LayerKV
    length: Array
    slots: Array | None


class NewEntries(NamedTuple):
    """What a forward pass adds to a cache: a LayerKV a layer, and hidden states [B, L, E] where a cache keeps them."""

    layers: tuple[LayerKV, ...]
    hidden: Array | None

    def cut(self, start: int, stop: int) -> "NewEntries":
        """Positions start..stop-1."""
        hidden = None if self.hidden is None else self.hidden[:, start:stop]
        return NewEntries(tuple(layer.cut(start, stop) for layer in self.layers), hidden)


def empty(*, heads: tuple[tuple[int, int], ...], batch: int, slots: int, dtype, width: int = 0) -> KVCache:
    """A cache without filled slots.

    Args:
        heads: of each layer, the number of key-value heads and their width.
        batch, slots: rows, and slots of each.
        dtype: of keys, values and hidden states.
        width: of the hidden states that are kept; 0 for none.
    """
    return KVCache(
        layers=tuple(
            LayerKV(k=jnp.zeros((batch, g, d, slots), dtype), v=jnp.zeros((batch, g, slots, d), dtype))
            for g, d in heads
        ),
        length=jnp.zeros(batch, jnp.int32),
        hidden=jnp.zeros((batch, slots, width), dtype) if width else None,
    )


def after(x: Array, done: Array) -> Array:
    """The integers x, available once `done` has been computed.

    An optimization barrier would say so, but XLA's CPU compiler removes those before it decides what to copy.
    This is a dependency of data instead: no float exceeds infinity, so nothing is added.
    """
    return x + (done[(0,) * done.ndim] > jnp.inf).astype(x.dtype)


def append(cache: KVCache, new: NewEntries, count: Array) -> KVCache:
    """Adds the first count[b] of T new positions to row b.

    The caller makes sure that length + T <= S for every row: all T are written, and those past count are overwritten
    by the next append. XLA would clamp a write past the end onto older slots.
    """

    def write(old: Array, add: Array, axis: int) -> Array:
        def one(row, piece, at):
            return jax.lax.dynamic_update_slice_in_dim(row, piece, at, axis)

        return jax.vmap(one)(old, add.astype(old.dtype), cache.length)

    layers = tuple(
        LayerKV(k=write(o.k, n.k, axis=2), v=write(o.v, n.v, axis=1))
        for o, n in zip(cache.layers, new.layers, strict=True)
    )
    hidden = None if cache.hidden is None else write(cache.hidden, new.hidden, axis=0)
    return KVCache(layers=layers, length=cache.length + count, hidden=hidden)


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


def scatter_hidden(old: Array, new: Array, slots: Array) -> Array:
    """[B, S, E] with new hidden states [B, W, E] in slots int32 [B, W]; an index of S is dropped."""
    rows = jnp.arange(old.shape[0], dtype=jnp.int32)[:, None]
    return old.at[rows, slots].set(new.astype(old.dtype), mode="drop")


def truncate(cache: KVCache, count: Array) -> KVCache:
    """Removes the last count[b] positions of row b, at most all."""
    return cache.replace(length=cache.length - count)


def resize(cache: KVCache, rows: Array, slots: int | None = None) -> KVCache:
    """The chosen rows, int32 [n], with `slots` slots (None: as many). ValueError for fewer than there are."""
    more = 0 if slots is None else slots - cache.slots
    if more < 0:
        raise ValueError(f"a cache of {cache.slots} slots can't be resized to {slots}: filled slots would be lost")

    def one(a: Array, axis: int) -> Array:
        return jnp.pad(jnp.take(a, rows, axis=0), [(0, more if i == axis else 0) for i in range(a.ndim)])

    return KVCache(
        layers=tuple(LayerKV(k=one(layer.k, 3), v=one(layer.v, 2)) for layer in cache.layers),
        length=jnp.take(cache.length, rows),
        hidden=None if cache.hidden is None else one(cache.hidden, 1),
    )
