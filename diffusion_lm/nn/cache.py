"""The key-value cache. `append` is the only function that writes one."""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


class LayerKV(struct.PyTreeNode):
    """One layer's keys and values, each [B, S, G, D]."""

    k: Array
    v: Array


@struct.dataclass
class KVCache:
    """What a network has read of each row: slots 0..length-1 are filled, the others must not be looked at.

    layers  one LayerKV [B, S, G, D] a layer (apart, not stacked: slicing a stack in a decoding loop copies it)
    length  int32 [B]
    """

    layers: tuple[LayerKV, ...]
    length: Array

    @property
    def slots(self) -> int:
        return self.layers[0].k.shape[1]


def empty(*, layers: int, batch: int, slots: int, kv_heads: int, head_width: int, dtype) -> KVCache:
    """A cache in which nothing has been read."""

    def zeros():
        return jnp.zeros((batch, slots, kv_heads, head_width), dtype)

    return KVCache(
        layers=tuple(LayerKV(k=zeros(), v=zeros()) for _ in range(layers)), length=jnp.zeros(batch, jnp.int32)
    )


def append(cache: KVCache, new: tuple[LayerKV, ...], count: Array) -> KVCache:
    """Adds the first count[b] of T new positions (each layer's LayerKV is [B, T, G, D]) to row b.

    The caller sees to it that length + T <= S for every row: all T are written, and those past count are overwritten
    by the next append. XLA would clamp a write past the end onto older slots.
    """

    def write(old: Array, add: Array) -> Array:
        def one(row, piece, at):
            return jax.lax.dynamic_update_slice(row, piece, (at, 0, 0))

        return jax.vmap(one)(old, add.astype(old.dtype), cache.length)

    layers = tuple(LayerKV(k=write(o.k, n.k), v=write(o.v, n.v)) for o, n in zip(cache.layers, new, strict=True))
    return KVCache(layers=layers, length=cache.length + count)
