"""A denoiser with its parameters: what objectives, samplers and evaluation are handed."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import AttentionPattern, DraftAndVerify, Full
from diffusion_lm.models.transformer import Transformer
from diffusion_lm.nn import cache as kv_cache
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.dot import dot
from diffusion_lm.nn.lm_head import unit
from diffusion_lm.sharding import platform
from diffusion_lm.types import LogitsHead

Array = jax.Array


@struct.dataclass
class BoundModel:
    """module and params; a pytree, so that it passes through jit."""

    module: Transformer = struct.field(pytree_node=False)
    params: dict

    def denoise(
        self, tokens: Array, t: Array, *, attention: AttentionPattern, positions: Array, segment_ids: Array, **vectors
    ):
        """`types.Denoise`."""
        where = {"positions": positions, "segment_ids": segment_ids}
        return self.module.apply({"params": self.params}, tokens, t, attention=attention, **where, **vectors)[0]

    def for_sampling(self, rows: int = 0) -> "BoundModel":
        """The same network with its layers apart and its matrices already rounded to the products' type.

        rows: how many rows of activations a pass multiplies (batch x canvas, or batch x 1), 0 for many.
        """
        compute_dtype = self.sampling_dtype(rows)
        params = unstacked(self.params) if self.module.scan else self.params
        params = jax.tree_util.tree_map_with_path(lambda path, a: _rounded(path[-1].key, a, compute_dtype), params)
        architecture = dataclasses.replace(self.module.architecture, compute_dtype=compute_dtype)
        return BoundModel(module=self.module.clone(scan=False, architecture=architecture), params=params)

    def sampling_dtype(self, rows: int) -> str:
        """The type of products that suits so many rows. A CPU multiplies a single row faster in float32: a bfloat16
        matrix-vector product isn't vectorised there."""
        single = rows == 1 and platform() == "cpu"
        return "float32" if single else self.module.architecture.compute_dtype

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache for `batch` rows of at most `slots` positions."""
        a = self.module.architecture.resolved
        sizes = {"layers": a.layers, "kv_heads": a.kv_heads, "head_dim": a.head_dim}
        return kv_cache.empty(batch=batch, slots=slots, dtype=a.compute_dtype, **sizes)

    def extend(
        self, cache: KVCache, tokens: Array, count: Array, attention: AttentionPattern
    ) -> tuple[LogitsHead, KVCache]:
        """Reads the next count[b] of clean tokens [B, T] as `reading` says: what it says of all T, the longer cache."""
        head, new = self._read(cache, tokens, jnp.zeros((tokens.shape[0], 1)), attention)
        return head, _appended(cache, head, new, count)

    def fork(self, cache: KVCache, tokens: Array, count: Array, masks: int) -> tuple[LogitsHead, LogitsHead, KVCache]:
        """Reads the next count[b] of clean tokens [B, T] as `extend` does causally, and in the same pass a canvas of so
        many masks behind each of them, as `read_canvas` at time 1 would if the text ended there.

        Returns what it says of the tokens, [B, T], of all canvases, [B, T * masks], and the cache with the tokens.
        """
        rows, text = tokens.shape
        canvases = jnp.full((rows, text * masks), self.module.vocab, jnp.int32)
        at = jnp.arange(text, dtype=jnp.int32)
        behind = at[:, None] + 1 + jnp.arange(masks, dtype=jnp.int32)[None]
        positions = cache.length[:, None] + jnp.concatenate([at, behind.reshape(-1)])[None]
        t = jnp.concatenate([jnp.zeros((rows, 1)), jnp.ones((rows, masks))], axis=1)
        (said, ahead), new = self.module.apply(
            {"params": self.params},
            jnp.concatenate([tokens, canvases], axis=1),
            t,
            attention=DraftAndVerify(text, masks),
            positions=positions,
            cache=cache,
        )
        return said, ahead, _appended(cache, said, tuple(layer.cut(0, text) for layer in new), count)

    def truncate(self, cache: KVCache, count: Array) -> KVCache:
        """Forgets the last count[b] positions that were read."""
        return kv_cache.truncate(cache, count)

    def resize(self, cache: KVCache, rows: Array, slots: int | None = None) -> KVCache:
        """The cache of the chosen rows, int32 [n], with `slots` slots, at least as many as it has (None: as many)."""
        return kv_cache.resize(cache, rows, slots)

    def read_canvas(self, cache: KVCache, canvas: Array, t: Array, **vectors) -> Array:
        """Logits [B, K, V] of a noisy canvas [B, K] at times t [B] that stands after the cache; writes nothing.

        vectors: `soft` and `mixed`, as in `types.Denoise`; segment_ids int32 [B, K]: see `samplers.base.Model`.
        """
        head, _ = self._read(cache, canvas, t[:, None], Full(), **vectors)
        return head.logits()

    def expected_embedding(self, logits: Array) -> Array:
        """softmax(logits) [B, K, V] @ the pieces' vectors, float32 [B, K, E]."""
        vectors = unit(self.params["embedding"][: self.module.vocab])
        return dot("bkv,ve->bke", jax.nn.softmax(logits, axis=-1), vectors, self.module.architecture.compute_dtype)

    def forward_positions(self, cache: KVCache, tokens: Array, at: Array, t: Array) -> tuple[Array, KVCache]:
        """Reads tokens [B, W] at times t [B] as the positions `at` int32 [B, W] of rows that are read both ways.

        They see one another, and every other position as the cache holds it from when it was last read: an
        approximation, unless nothing has changed. The cache has a slot for each of the row's L positions, which must
        all have been read once. Returns logits [B, W, V], and the cache with what was read. A row's entries of `at`
        differ, except that L stands for no position: nobody sees it, its logits mean nothing. With W = L, the i-th
        is i or L.
        """
        head, layers = self.module.apply(
            {"params": self.params}, tokens, t[:, None], attention=Full(), positions=at, cache=cache, again=True
        )
        return head.logits(), cache.replace(layers=layers)

    def _read(self, cache: KVCache, tokens: Array, t: Array, attention: AttentionPattern, **vectors):
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        where = {"positions": positions, "cache": cache}
        return self.module.apply({"params": self.params}, tokens, t, attention=attention, **where, **vectors)


def _appended(cache: KVCache, head: LogitsHead, new: tuple, count: Array) -> KVCache:
    """The cache with what a pass has read."""
    # Never 1. A write that waits for all reads is made in place; one that might come first is made in a copy.
    late = (head.hidden[0, 0, 0] > 1e38).astype(jnp.int32)
    return kv_cache.append(cache.replace(length=cache.length + late), new, count)


def _rounded(name: str, a: Array, compute_dtype: str) -> Array:
    """Matrices, but not the one that chooses experts: its products are float32 in training, too."""
    return a.astype(compute_dtype) if a.ndim > 1 and name != "router" else a


def unstacked(params: dict) -> dict:
    """{'layers': stacked} -> {'layer_0': ..., 'layer_1': ...}: the layers that `Transformer(scan=False)` names."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    apart = {f"layer_{i}": jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(count)}
    return rest | apart
