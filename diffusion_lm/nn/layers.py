"""One layer of the transformer, and its parts."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import AttentionPattern, Ranges, valid_mask
from diffusion_lm.nn.attention import dot_product_attention
from diffusion_lm.nn.cache import CachedLayer, LayerKV, scatter
from diffusion_lm.nn.dot import dot, matrix, ones
from diffusion_lm.nn.lora import LoRA
from diffusion_lm.nn.moe import ACTIVATIONS, Experts
from diffusion_lm.nn.rope import Rotation, rotate
from diffusion_lm.nn.specs import (
    AttentionSpec,
    Execution,
    ExpertsSpec,
    LayerSpec,
    MLPSpec,
    ModulationSpec,
    NormSpec,
    SelfConditioningSpec,
)
from diffusion_lm.sharding import cut

Array = jax.Array


class Norm(nn.Module):
    """A normalisation over the last axis, with a learned scale and bias where it has them."""

    spec: NormSpec
    axis_name: str = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def param(name, start):
            init = nn.with_logical_partitioning(nn.initializers.constant(start), (self.axis_name,))
            return self.param(name, init, (x.shape[-1],), jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))

        if self.spec.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.spec.eps)
        if self.spec.scale:
            scale = param("scale", 1.0 - self.spec.offset)
            normal = normal * (self.spec.offset + scale if self.spec.offset else scale)
        return normal + param("bias", 0.0) if self.spec.bias else normal


def _product(exec: Execution, lora: LoRA | None, noisy: tuple[int, int]) -> Callable[[str, Array, Array], Array]:
    """The product with a matrix. What comes before clean positions isn't trained where adapters are at noisy ones."""
    if lora is None or lora.where == "all":
        return exec.product
    return functools.partial(exec.product, span=noisy)


class Attention(nn.Module):
    """Attention of a row to itself, and to what a cache holds, under an attention pattern."""

    spec: AttentionSpec
    exec: Execution
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self, x: Array, rotation: Rotation | None, attention: AttentionPattern, ranges: Ranges, past: CachedLayer | None
    ) -> tuple[Array, LayerKV]:
        a, width, product = self.spec, x.shape[-1], _product(self.exec, self.lora, attention.noisy(x.shape[1]))
        wq = matrix(self, "query", (width, a.heads, a.head_dim), ("embed", "heads", "head_dim"), width)
        shape = (width, 1 if a.tie_kv else 2, a.kv_heads, a.head_dim)
        wkv = matrix(self, "key_value", shape, ("embed", None, "kv_heads", "head_dim"), width)
        wo = matrix(self, "output", (a.heads, a.head_dim, width), ("heads", "head_dim", "embed"), 0)
        q, kv = product("ble,ehd->blhd", x, wq), product("ble,ecgd->blcgd", x, wkv)
        if self.lora is not None:
            adapter = functools.partial(
                self.lora.add, self, noisy=attention.noisy(x.shape[1]), compute_dtype=self.exec.compute_dtype
            )
            inputs, last = (("embed", width),), ("head_dim", a.head_dim)
            q = adapter("query", x=x, y=q, inputs=inputs, outputs=(("heads", a.heads), last))
            outputs = (("kv_heads", a.kv_heads), last)
            kv = adapter("key_value", x=x, y=kv, inputs=inputs, outputs=outputs, parts=((None, shape[1]),))
        if a.qkv_bias:
            q += matrix(self, "query_bias", (a.heads, a.head_dim), ("heads", "head_dim"), 0)[None, None]
            bias = matrix(self, "key_value_bias", shape[1:], (None, "kv_heads", "head_dim"), 0)
            kv += bias[None, None]
        q, kv = jnp.swapaxes(q, 1, 2), jnp.unstack(jnp.swapaxes(kv, 1, 3), axis=2)
        k, v = kv[0], kv[-1]
        if a.qk_norm is not None:
            q = Norm(a.qk_norm, axis_name="head_dim", name="query_norm")(q)
            k = Norm(a.qk_norm, axis_name="head_dim", name="key_norm")(k)
        v = v if a.value_norm is None else Norm(a.value_norm, axis_name="head_dim", name="value_norm")(v)
        if a.rope is not None:
            k = rotate(k, rotation)
        # The barrier: XLA would fold the rotation into the product of k's gradient, in a form that its CPU can't run.
        k = jax.lax.optimization_barrier(jnp.swapaxes(k, 2, 3))
        # Every device that holds a part of a row gets all of its keys and values.
        new = LayerKV(k=cut(k, "batch", "kv_heads", None, None), v=cut(v, "batch", "kv_heads", None, None))
        if a.rope is not None:
            q = rotate(q, rotation)
            q = q if rotation.query_scale is None else q * rotation.query_scale[:, None, :, None]
        q = q * (a.score_scale * math.sqrt(a.head_dim)) if a.score_scale else q  # attention divides by the root
        if past is not None and past.slots is not None:
            new = scatter(past.kv, new, past.slots)
        how = {"compute_dtype": self.exec.compute_dtype, "kernel": self.exec.attention_kernel}
        how |= {"window": a.window, "whole_canvas": a.whole_canvas}
        mixed = jnp.swapaxes(dot_product_attention(q, new, attention, ranges, past, **how), 1, 2)
        # Flat, so that no compiler transposes the weights in place of a few activations.
        mixed = mixed.reshape(*x.shape[:2], -1)
        out = product("blm,me->ble", mixed, wo.reshape(-1, width))
        if self.lora is not None:
            inputs = (("heads", a.heads), ("head_dim", a.head_dim))
            out = adapter("output", x=mixed, y=out, inputs=inputs, outputs=(("embed", width),))
        return (out + matrix(self, "output_bias", (width,), ("embed",), 0)[None, None] if a.out_bias else out), new


class MLP(nn.Module):
    """A feed-forward layer, gated (SwiGLU and its like, arXiv 2002.05202) or plain.

    x: [B, L, E], of which the positions noisy[0] to noisy[1] - 1 are noisy, for adapters.
    """

    spec: MLPSpec
    exec: Execution
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array, noisy: tuple[int, int] = (0, 0)) -> Array:
        m, width, product = self.spec, x.shape[-1], _product(self.exec, self.lora, noisy)
        activation, parts = ACTIVATIONS[m.activation], 2 if m.gated else 1
        up = matrix(self, "gate_up", (width, parts, m.dim), ("embed", None, "mlp"), width)
        down = matrix(self, "down", (m.dim, width), ("mlp", "embed"), 0)
        hidden = product("ble,ecm->blcm", x, up)
        if self.lora is not None:
            adapter = functools.partial(self.lora.add, self, noisy=noisy, compute_dtype=self.exec.compute_dtype)
            axes = {"inputs": (("embed", width),), "outputs": (("mlp", m.dim),), "parts": ((None, parts),)}
            hidden = adapter("gate_up", x=x, y=hidden, **axes)
        if m.bias:
            hidden += matrix(self, "gate_up_bias", (parts, m.dim), (None, "mlp"), 0)[None, None]
        gate, *value = jnp.unstack(hidden, axis=2)  # its gradient is joined, where an index's would be added up
        hidden = activation(gate) * value[0] if m.gated else activation(gate)
        out = product("blm,me->ble", hidden, down)
        if self.lora is not None:
            out = adapter("down", x=hidden, y=out, inputs=(("mlp", m.dim),), outputs=(("embed", width),))
        return out + matrix(self, "down_bias", (width,), ("embed",), 0)[None, None] if m.bias else out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Returns x, and the new keys and values (None without a cache) with the experts' load-balancing loss (None without).
    """

    spec: LayerSpec
    exec: Execution
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self, x: Array, past, time: Array | None, rotation: Rotation | None, attention: AttentionPattern, ranges: Ranges
    ):
        s, aux = self.spec, None
        shift, scale, gate = self._modulation(time, x)
        h = Norm(s.norm, name="attention_norm")(x)
        h, new = Attention(s.attention, self.exec, self.lora, name="attention")(
            h * (1 + scale[0]) + shift[0], rotation, attention, ranges, past
        )
        h = h if s.post_norm is None else Norm(s.post_norm, name="attention_post_norm")(h)
        x = x + gate[0] * h
        after, h = x, Norm(s.norm, name="mlp_norm")(x) * (1 + scale[1]) + shift[1]
        if isinstance(s.mlp, ExpertsSpec):
            mixed, aux = Experts(s.mlp, self.exec, name="experts")(h, valid_mask(ranges))
            if s.mlp.shared_dim:
                mixed += MLP(MLPSpec(dim=s.mlp.shared_dim), self.exec, name="shared_expert")(h)
            h = mixed
        else:
            h = MLP(s.mlp, self.exec, self.lora, name="mlp")(h, attention.noisy(h.shape[1]))
        if s.experts is not None:
            beside = Norm(s.norm, name="experts_norm")(after)
            mixed, aux = Experts(s.experts, self.exec, name="experts")(beside, valid_mask(ranges), after)
            h = Norm(s.post_norm, name="mlp_branch_norm")(h) + Norm(s.post_norm, name="experts_branch_norm")(mixed)
        h = h if s.post_norm is None else Norm(s.post_norm, name="mlp_post_norm")(h)
        x = x + gate[1] * h
        x = x * ones(self, "output_scale", 1)[None, None] if s.output_scale else x
        return cut(x, "batch", "length", "embed"), (new if past is not None else None, aux)

    def _modulation(self, time: Array | None, x: Array):
        """Shift, scale and gate of both parts, each two of [B, L, E]; without modulation: 0, 0, 1."""
        m = self.spec.modulation
        if m is None:
            return (0.0, 0.0), (0.0, 0.0), (1.0, 1.0)
        *first, gate_a, shift_m, scale_m, gate_m = Modulation(m, self.exec, parts=6, name="adaln")(time, x)
        return (first[0], shift_m), (first[1], scale_m), (m.gate_offset + gate_a, m.gate_offset + gate_m)


class Modulation(nn.Module):
    """time [B, n, C], the vector that a `TimeSpec` makes, and x [B, L, E] -> `parts` times [B, L, E]."""

    spec: ModulationSpec
    exec: Execution
    parts: int

    @nn.compact
    def __call__(self, time: Array, x: Array) -> Array:
        length, shape = x.shape[1], (time.shape[-1], self.parts, x.shape[-1])
        kernel = matrix(self, "kernel", shape, ("embed", None, None), 0)
        found = dot("bnc,cpe->bnpe", time, kernel, self.exec.compute_dtype)
        if self.spec.bias:
            found += matrix(self, "kernel_bias", shape[1:], (None, None), 0)[None, None]
        found = jnp.repeat(found, length // time.shape[1], axis=1, total_repeat_length=length)
        return jnp.moveaxis(found, 2, 0)


class SelfConditioning(nn.Module):
    """Adds a gated feed-forward of the normalised expected embedding of the previous prediction to the embedded tokens,
    and normalises the sum: the form of DiffusionGemma's public code, of the idea of arXiv 2208.04202, section 3.

    x, self_cond: float32 [B, L, E]; self_cond None stands for zeros, of which nothing is added.
    canvas: bool [1 or B, L, 1], which positions it applies to; None for all.
    """

    spec: SelfConditioningSpec
    exec: Execution

    @nn.compact
    def __call__(self, x: Array, self_cond: Array | None, canvas: Array | None = None) -> Array:
        if self_cond is None and self.is_initializing():
            self_cond = jnp.zeros_like(x)
        found = x
        if self_cond is not None:
            found = x + MLP(self.spec.mlp, self.exec, name="mlp")(Norm(self.spec.norm, name="soft_norm")(self_cond))
        found = Norm(self.spec.sum_norm, name="sum_norm")(found)
        return found if canvas is None else jnp.where(canvas, found, x)
