"""One layer of the transformer, and its parts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import AttentionPattern, Ranges, valid_mask
from diffusion_lm.nn.attention import dot_product_attention
from diffusion_lm.nn.cache import CachedLayer, LayerKV, scatter
from diffusion_lm.nn.dot import dot
from diffusion_lm.nn.matrix import matrix
from diffusion_lm.nn.moe import Experts
from diffusion_lm.sharding import cut

Array = jax.Array
_EPSILON = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x), times a learned scale, over the last axis (arXiv 1910.07467)."""

    axis_name: str = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis_name,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPSILON)
        return normal * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def rotate(x: Array, angles: Array) -> Array:
    """Rotary positions (arXiv 2104.09864): x [B, H, L, D], angles float32 [B, L, D / 2]."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) as a reading says, over the row itself and what a cache holds."""

    architecture: "Architecture"  # noqa: F821  (the denoiser's file is above this one)

    @nn.compact
    def __call__(
        self, x: Array, angles: Array, attention: AttentionPattern, ranges: Ranges, past: CachedLayer | None
    ) -> tuple[Array, LayerKV]:
        a = self.architecture
        wq = matrix(self, "query", (a.width, a.heads, a.head_dim), ("embed", "heads", "head_dim"), a.width)
        shape = (a.width, 2, a.kv_heads, a.head_dim)
        wkv = matrix(self, "key_value", shape, ("embed", None, "kv_heads", "head_dim"), a.width)
        wo = matrix(self, "output", (a.heads, a.head_dim, a.width), ("heads", "head_dim", "embed"), 0)
        q = jnp.swapaxes(dot("ble,ehd->blhd", x, wq, a.compute_dtype, a.quantization), 1, 2)
        k, v = jnp.transpose(dot("ble,ecgd->blcgd", x, wkv, a.compute_dtype, a.quantization), (2, 0, 3, 1, 4))
        if a.qk_norm:
            q, k = RMSNorm(axis_name="head_dim", name="query_norm")(q), RMSNorm("head_dim", name="key_norm")(k)
        # The barrier: XLA would fold the turn into the product of k's gradient, in a form that its CPU can't run.
        k = jax.lax.optimization_barrier(jnp.swapaxes(rotate(k, angles), 2, 3))
        # Every device that holds a part of a row gets all of its keys and values.
        new = LayerKV(k=cut(k, "batch", "kv_heads", None, None), v=cut(v, "batch", "kv_heads", None, None))
        q = rotate(q, angles)
        if past is not None and past.slots is not None:
            new = scatter(past.kv, new, past.slots)
        mixed = dot_product_attention(
            q, new, attention, ranges, past, compute_dtype=a.compute_dtype, kernel=a.attention_kernel
        )
        mixed = jnp.swapaxes(mixed, 1, 2)
        # Flat, so that no compiler thinks of turning the weights over instead of a few activations.
        mixed, wo = mixed.reshape(*x.shape[:2], -1), wo.reshape(-1, a.width)
        return dot("blm,me->ble", mixed, wo, a.compute_dtype, a.quantization), new


class SwiGLU(nn.Module):
    """silu(x W_gate) * (x W_up) W_down (arXiv 2002.05202)."""

    architecture: "Architecture"  # noqa: F821

    @nn.compact
    def __call__(self, x: Array) -> Array:
        a = self.architecture
        up = matrix(self, "gate_up", (a.width, 2, a.mlp_dim), ("embed", None, "mlp"), a.width)
        down = matrix(self, "down", (a.mlp_dim, a.width), ("mlp", "embed"), 0)
        gate, value = jnp.moveaxis(dot("ble,ecm->blcm", x, up, a.compute_dtype, a.quantization), 2, 0)
        return dot("blm,me->ble", jax.nn.silu(gate) * value, down, a.compute_dtype, a.quantization)


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)), or a mixture of such experts; with a time, norms are modulated
    and sums gated (adaLN-zero, arXiv 2212.09748).

    Returns x and, where there are such, the new keys and values and the experts' balance loss.
    """

    architecture: "Architecture"  # noqa: F821

    @nn.compact
    def __call__(self, x: Array, past, time: Array | None, angles: Array, attention, ranges):
        a = self.architecture
        shift, scale, gate = self._modulation(time, x.shape[1])
        h = RMSNorm(name="attention_norm")(x)
        h, new = Attention(a, name="attention")(h * (1 + scale[0]) + shift[0], angles, attention, ranges, past)
        x = x + gate[0] * h
        h, uneven = RMSNorm(name="mlp_norm")(x) * (1 + scale[1]) + shift[1], None
        if a.num_experts:
            h, uneven = Experts(a, name="experts")(h, valid_mask(ranges))
        else:
            h = SwiGLU(a, name="mlp")(h)
        x = cut(x + gate[1] * h, "batch", "length", "embed")
        return x, (new if past is not None else None, uneven)

    def _modulation(self, time: Array | None, length: int):
        """time [B, n, E] -> shift, scale, gate, each two of [B, L, E]; none: 0, 0, 1."""
        if time is None:
            return (0.0, 0.0), (0.0, 0.0), (1.0, 1.0)
        width = self.architecture.width
        w = matrix(self, "modulation", (width, 6, width), ("embed", None, None), 0)
        parts = dot("bne,ecf->bncf", jax.nn.silu(time), w, self.architecture.compute_dtype)
        parts = jnp.repeat(parts, length // time.shape[1], axis=1, total_repeat_length=length)
        shift_a, shift_m, scale_a, scale_m, gate_a, gate_m = jnp.moveaxis(parts, 2, 0)
        return (shift_a, shift_m), (scale_a, scale_m), (1 + gate_a, 1 + gate_m)
