"""The key-value cache. `append` is the only function that writes one, `rewind` the only one that forgets."""

import jax
import jax.numpy as jnp
from flax import struct

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


def empty(*, layers: int, batch: int, slots: int, kv_heads: int, head_width: int, dtype) -> KVCache:
    """A cache in which nothing has been read."""

    k, v = (batch, kv_heads, head_width, slots), (batch, kv_heads, slots, head_width)
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


def rewind(cache: KVCache, count: Array) -> KVCache:
    """Forgets the last count[b] positions of row b, at most all."""
    return cache.replace(length=cache.length - count)
