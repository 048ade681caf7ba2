"""A denoiser with its parameters: what objectives, samplers and evaluation are given."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import AttentionPattern, DraftAndVerify, Full
from diffusion_lm.models.base import ModelSpec
from diffusion_lm.models.transformer import Transformer, input_embeddings
from diffusion_lm.nn import cache as kv_cache
from diffusion_lm.nn.cache import KVCache, NewEntries
from diffusion_lm.nn.dot import dot
from diffusion_lm.sharding import platform
from diffusion_lm.types import LogitsHead

Array = jax.Array


@struct.dataclass
class BoundModel:
    """A module and its parameters; a pytree, so that it passes through jit."""

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

        Args:
            rows: how many rows of activations a pass multiplies (batch x canvas, or batch x 1), 0 for many.
        """
        compute_dtype = self.sampling_dtype(rows)
        params = unstacked(self.params) if self.module.scan else self.params
        params = jax.tree_util.tree_map_with_path(
            lambda path, a: a.astype(compute_dtype) if is_rounded(path[-1].key, a.ndim) else a, params
        )
        execution = dataclasses.replace(self.module.exec, compute_dtype=compute_dtype)
        return BoundModel(module=self.module.clone(scan=False, exec=execution), params=params)

    def sampling_dtype(self, rows: int) -> str:
        """The type of products that is fastest for so many rows. A CPU multiplies a single row faster in float32: XLA
        doesn't vectorise a bfloat16 matrix-vector product there."""
        single = rows == 1 and platform() == "cpu"
        return "float32" if single else self.module.exec.compute_dtype

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache for `batch` rows of at most `slots` positions."""
        s = self.module.spec
        layers = [group.layer.attention for group in s.groups for _ in range(group.repeat)]
        heads = tuple((a.kv_heads, a.head_dim) for a in layers)
        width = s.width if s.logit_shift else 0
        return kv_cache.empty(heads=heads, batch=batch, slots=slots, dtype=self.module.exec.compute_dtype, width=width)

    def extend(
        self, cache: KVCache, tokens: Array, count: Array, attention: AttentionPattern
    ) -> tuple[LogitsHead, KVCache]:
        """A forward pass over clean tokens [B, T] after the cache: predictions at all T, and the cache with the first
        count[b] of them."""
        head, new = self._after(cache, tokens, jnp.zeros((tokens.shape[0], 1)), attention)
        return head, _appended(cache, head, new, count)

    def draft_and_verify(
        self, cache: KVCache, tokens: Array, count: Array, masks: int, causal: bool = False
    ) -> tuple[LogitsHead, LogitsHead, KVCache]:
        """`extend` under causal attention and, in the same pass, a canvas of so many masks after each of the tokens, as
        `denoise_canvas` at time 1 would predict it if the text ended there; with `causal`, as `objectives.drafting`
        trains masks after a text: each predicts the token after it.

        Returns:
            Predictions at the tokens [B, T] and at all canvases [B, T * masks], and the cache with the tokens.
        """
        (rows, text), mask = tokens.shape, self.module.vocabulary.mask
        attention, at = DraftAndVerify(text, masks, causal), jnp.arange(text, dtype=jnp.int32)
        canvases = at[:, None] + 1 + jnp.arange(masks, dtype=jnp.int32)[None]
        (head, drafts), new = self.module.apply(
            {"params": self.params},
            attention.join(tokens, jnp.full((rows, text * masks), mask, jnp.int32)),
            attention.join(jnp.zeros((rows, 1)), jnp.ones((rows, masks))),
            attention=attention,
            positions=cache.length[:, None] + jnp.concatenate([at, canvases.reshape(-1)])[None],
            cache=cache,
        )
        return head, drafts, _appended(cache, head, new.cut(0, text), count)

    def truncate(self, cache: KVCache, count: Array) -> KVCache:
        """The cache without the last count[b] positions."""
        return kv_cache.truncate(cache, count)

    def resize(self, cache: KVCache, rows: Array, slots: int | None = None) -> KVCache:
        """The cache of the chosen rows, int32 [n], with `slots` slots, at least as many as it has (None: as many)."""
        return kv_cache.resize(cache, rows, slots)

    def denoise_canvas(self, cache: KVCache, canvas: Array, t: Array, **vectors) -> Array:
        """Logits [B, K, V] of a noisy canvas [B, K] at times t [B] that follows the cache; the cache stays as it is.

        vectors: `self_cond` and `embeddings`, as in `types.Denoise`; segment_ids int32 [B, K], documents of the canvas.
        """
        head, _ = self._after(cache, canvas, t[:, None], Full(), **vectors)
        return head.logits()

    def expected_embedding(self, logits: Array) -> Array:
        """softmax(logits) [B, K, V] @ the tokens' embeddings, float32 [B, K, E]."""
        vectors = input_embeddings(self.module.spec, self.params["embedding"][: self.module.vocabulary.size])
        return dot("bkv,ve->bke", jax.nn.softmax(logits, axis=-1), vectors, self.module.exec.compute_dtype)

    def forward_positions(self, cache: KVCache, tokens: Array, at: Array, t: Array) -> tuple[Array, KVCache]:
        """A forward pass over some positions of rows under full attention.

        They attend to one another, and to every other position as the cache holds it from the pass that last computed
        it: an approximation, unless nothing has changed since.

        Args:
            cache: with a slot for each of the row's L positions, all of which have been computed once.
            tokens: int32 [B, W], at times t [B].
            at: int32 [B, W], their positions, all different in a row; L stands for none: nothing attends to it, and its
                logits mean nothing. With W = L, the i-th is i or L.

        Returns:
            Logits [B, W, V], and the cache with these positions.
        """
        head, new = self.module.apply(
            {"params": self.params}, tokens, t[:, None], attention=Full(), positions=at, cache=cache, recompute=True
        )
        return head.logits(), cache.replace(layers=new.layers, hidden=new.hidden)

    def _after(self, cache: KVCache, tokens: Array, t: Array, attention: AttentionPattern, **vectors):
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        where = {"positions": positions, "cache": cache}
        return self.module.apply({"params": self.params}, tokens, t, attention=attention, **where, **vectors)


def _appended(cache: KVCache, head: LogitsHead, new: NewEntries, count: Array) -> KVCache:
    """The cache with a pass's new entries."""
    # The write waits for the pass to end: a cache that nothing reads any more is written in place, not in a copy.
    return kv_cache.append(cache.replace(length=kv_cache.after(cache.length, head.hidden)), new, count)


def is_rounded(name: str, ndim: int) -> bool:
    """Whether sampling holds a parameter in the type of products: matrices, but not the router's, whose products are
    float32 in training, too."""
    return ndim > 1 and name != "router" and not name.endswith("_bias")


def stored(abstract: Any, compute_dtype: str) -> Any:
    """Shapes of parameters (ShapeDtypeStructs) in the types that a converted model's are stored in."""

    def one(path, leaf):
        dtype = compute_dtype if is_rounded(path[-1].key, leaf.ndim) else jnp.float32
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, abstract)


def unstacked(params: dict) -> dict:
    """{'layers': stacked} or {'layers_0': stacked, ...} -> {'layer_0': ..., 'layer_1': ...}: the names of the layers of
    `Transformer(scan=False)`."""
    groups = sorted((name for name in params if name.startswith("layers")), key=lambda n: int(n[7:] or 0))
    apart = []
    for name in groups:
        count = jax.tree.leaves(params[name])[0].shape[0]
        apart += [jax.tree.map(lambda a, i=i: a[i], params[name]) for i in range(count)]
    rest = {name: value for name, value in params.items() if name not in groups}
    return rest | {f"layer_{i}": layer for i, layer in enumerate(apart)}


def stacked(params: dict, spec: ModelSpec) -> dict:
    """The inverse of `unstacked`: the names of `Transformer(scan=True)`."""
    rest, start = {name: value for name, value in params.items() if not name.startswith("layer_")}, 0
    for number, group in enumerate(spec.groups):
        apart = [params[f"layer_{i}"] for i in range(start, start + group.repeat)]
        name = "layers" if len(spec.groups) == 1 else f"layers_{number}"
        rest[name] = jax.tree.map(lambda *layers: jnp.stack(layers), *apart)
        start += group.repeat
    return rest
