"""Attention by cuDNN's kernel for NVIDIA's GPUs, through `jax.nn.dot_product_attention`: tested by lowering only.

It is causal or full, in bfloat16. Documents would take a mask of length squared. Here a few more columns of queries and
keys keep them apart, whose product is 0 inside a document and far below any score between two.
"""

import functools
import math

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import KeyRange
from diffusion_lm.nn.cache import LayerKV
from diffusion_lm.sharding import each_device, platform, ways_in_force

Array = jax.Array
_COLUMNS = 8  # the kernel needs heads whose width is a multiple of it
_APART = 16.0  # two documents' scores are 2 x its square apart; whole multiples of it are exact in bfloat16

_fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def check_devices() -> None:
    """ValueError off GPUs, and where a mesh cuts rows along their length."""
    if platform() != "gpu":
        raise ValueError(
            f"exec.attention_kernel=cudnn is for NVIDIA's GPUs and this runs on {platform()}: set "
            "exec.attention_kernel=auto"
        )
    if ways_in_force("length") > 1:
        raise ValueError(
            f"exec.attention_kernel=cudnn needs whole rows and mesh.sequence={ways_in_force('length')} cuts them: set "
            "mesh.sequence=1 or exec.attention_kernel=chunked"
        )


def cudnn_attention(q: Array, new: LayerKV, kind: str, key_range: KeyRange, *, compute_dtype: str) -> Array:
    """As `attention.dot_product_attention`, without a cache, for one group of queries: q [B, H, L, D] -> float32, as q.

    ValueError for heads that are too wide for the kernel.
    """
    length, width = q.shape[2:]
    documents = _documents(kind, key_range, length)
    arrays = (q / math.sqrt(width), new.k, new.v) + (() if documents is None else (documents,))

    def here(q, k, v, *documents):
        q, k, v = jnp.swapaxes(q, 1, 2), jnp.transpose(k, (0, 3, 1, 2)), jnp.swapaxes(v, 1, 2)
        q, k, v = _widened(*(_even(a).astype(compute_dtype) for a in (q, k, v)), *map(_even, documents))
        found = _fused(q, k, v, scale=1.0, is_causal=kind == "causal")
        return jnp.swapaxes(found[:, :length, :, :width], 1, 2).astype(jnp.float32)

    shared = ("batch", "kv_heads", None, None)
    axes = (("batch", "heads", None, None), shared, shared, ("batch", None))
    try:
        return each_device(here, axes[: len(arrays)])(*arrays)
    except NotImplementedError as error:
        raise ValueError(f"exec.attention_kernel=cudnn: {error} Set exec.attention_kernel=chunked") from error


def _documents(kind: str, key_range: KeyRange, length: int) -> Array | None:
    """int32 [1 or B, L], 1 or more, for `_even` to pad with another one; None where that makes no difference."""
    if key_range.query_segment_ids is not None:
        return key_range.query_segment_ids + 1
    return jnp.ones((1, length), jnp.int32) if length % 2 and kind == "full" else None


def _even(a: Array) -> Array:
    """[B, L, ...] with a zero more where L is odd: the kernel has no gradient of odd lengths."""
    return jnp.pad(a, ((0, 0), (0, a.shape[1] % 2)) + ((0, 0),) * (a.ndim - 2))


def _widened(q: Array, k: Array, v: Array, documents: Array | None = None) -> tuple[Array, Array, Array]:
    """[B, L, heads, D] with the columns that keep documents apart, and zeros up to a multiple of eight."""
    if documents is not None:
        of_queries, of_keys = _codes(documents, q.shape[1])
        q, k = (
            jnp.concatenate([jnp.broadcast_to(code.astype(a.dtype), (*a.shape[:3], code.shape[-1])), a], axis=-1)
            for a, code in ((q, of_queries), (k, of_keys))
        )
    wide = -(-q.shape[-1] // _COLUMNS) * _COLUMNS
    return tuple(jnp.pad(a, ((0, 0),) * 3 + ((0, wide - a.shape[-1]),)) for a in (q, k, v))


def _codes(documents: Array, length: int) -> tuple[Array, Array]:
    """float32 [B, L, 1, n], queries' and keys'. Their product: 0, less 2 _APART^2 for each binary digit in which two
    documents of 0..L + 1 differ."""
    digits = (length + 1).bit_length()
    places = jnp.arange(digits, dtype=jnp.int32)[None, None, None]
    signs = _APART * (2.0 * (documents[..., None, None] >> places & 1) - 1.0)
    one = jnp.full((*signs.shape[:3], 1), _APART)
    return jnp.concatenate([signs, one], axis=-1), jnp.concatenate([signs, -digits * one], axis=-1)
