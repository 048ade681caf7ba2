"""What a layer is (its parts and their sizes), and how a network runs: the values that layers are built from."""

import dataclasses
from typing import Literal

import jax

from diffusion_lm.nn.dot import dot

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a network runs. Nothing here changes what it is, and a run may change all of it when it resumes.

    Args:
        compute_dtype: the type of the factors of matrix products; sums are float32 in any case. A CPU that multiplies
            bfloat16 no faster than float32 multiplies float32 copies of many rows.
        attention_kernel: "splash" is TPUs' kernel, "cudnn" is NVIDIA GPUs' (tested by lowering only) for plain causal
            and full attention, both in bfloat16; "chunked" is plain XLA; "auto" is splash on TPUs, else chunked.
        remat: what a layer keeps for its backward pass: "none" keeps all, "dots" only its products, "full" nothing.
        quantization: "int8" multiplies in int8 in the forward pass of layers, at twice the rate of bfloat16 on some
            accelerators (as AQT does, github.com/google/aqt). All else, and the gradient, stays in `compute_dtype`.
    """

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention_kernel: Literal["auto", "splash", "cudnn", "chunked"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    quantization: Literal["none", "int8"] = "none"

    def __post_init__(self):
        if self.quantization not in ("none", "int8"):
            raise ValueError(f"exec.quantization={self.quantization} is unknown: set it to none or int8")
        if self.attention_kernel in ("splash", "cudnn") and self.compute_dtype != "bfloat16":
            raise ValueError(
                f"exec.attention_kernel={self.attention_kernel} multiplies in bfloat16, not in "
                f"exec.compute_dtype={self.compute_dtype}: set exec.attention_kernel=chunked"
            )

    def product(self, spec: str, a: Array, b: Array, span: tuple[int, int] | None = None) -> Array:
        """A layer's matrix product: einsum(spec, a, b), float32; span: see `dot`."""
        return dot(spec, a, b, self.compute_dtype, self.quantization, span)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation over the last axis.

    Args:
        kind: "rms" divides by the root mean square (arXiv 1910.07467), "layer" subtracts the mean first.
        eps: added to the mean square.
        offset: the scale is offset + parameter (1 in Gemma's, which start at 0).
        scale: whether there is a learned scale.
        bias: whether a learned bias is added.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    scale: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary rates are stretched for texts longer than those of pretraining.

    Args:
        kind: "linear" divides positions by `factor`; "llama3" does so to slow rates only; "yarn" is arXiv 2309.00071.
        factor: by how much texts are longer.
        original_length: the positions of pretraining ("llama3", "yarn").
        low, high: wavelengths above original_length / low are stretched, those below original_length / high are not
            ("llama3"); the same two limits in turns over original_length ("yarn": beta_slow, beta_fast).
        magnitude: what cosines and sines are multiplied by ("yarn"); 0 for 0.1 log(factor) + 1.
        query_growth: b, where queries are multiplied by 1 + b log(1 + floor(position / original_length)), as in
            Llama 4.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int = 0
    low: float = 1.0
    high: float = 4.0
    magnitude: float = 0.0
    query_growth: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (arXiv 2104.09864).

    Args:
        theta: base of the rates.
        fraction: the first part of each head's width that is rotated, in (0, 1].
        proportional: rates are those of the whole width, and pairs are its halves' columns; all but the fastest
            `fraction` of them are 0 (Gemma 4).
        scaling: stretched rates for longer texts; None for none.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    proportional: bool = False
    scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention (arXiv 2305.13245).

    Args:
        heads, kv_heads, head_dim: sizes.
        qkv_bias, out_bias: biases of the query, key and value projections, and of the output projection.
        tie_kv: values are the keys before their norm and rope (Gemma 4).
        qk_norm: norm of each head's queries and keys before rope; None for none.
        value_norm: norm of each head's values; None for none.
        rope: rotary positions; None for none.
        score_scale: what products of queries and keys are multiplied by; 0 for head_dim ** -0.5.
        window: sliding window: keys at this distance or further are not attended to; 0 for no limit.
        whole_canvas: a canvas attends to all of itself, and the window counts from its first position
            (DiffusionGemma).
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    tie_kv: bool = False
    qk_norm: NormSpec | None = None
    value_norm: NormSpec | None = None
    rope: RopeSpec | None = RopeSpec()
    score_scale: float = 0.0
    window: int = 0
    whole_canvas: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """A feed-forward layer.

    Args:
        dim: hidden units.
        gated: activation(x W_gate) * (x W_up) W_down (arXiv 2002.05202), in place of activation(x W_up) W_down.
        activation: its nonlinearity; relu2 is relu squared.
        bias: whether its products have biases.
    """

    dim: int
    gated: bool = True
    activation: Literal["silu", "gelu_tanh", "relu2"] = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """A mixture of gated feed-forwards, of which each position uses those that its router scores highest.

    Args:
        dim: hidden units of each expert.
        activation: of each expert.
        num_experts, num_experts_per_token: how many there are, and how many each position uses.
        scoring: scores become weights by "softmax" over all experts, or by the "sigmoid" of each.
        normalize: whether the weights of the chosen experts are divided by their sum.
        scale: what weights are multiplied by after that.
        selection_bias: whether a bias is added to the weights to choose experts only (arXiv 2408.15664).
        num_groups, groups_per_token: experts are chosen from the groups whose two best sum highest (arXiv 2412.19437,
            section 2.1.2); 1 and 1 for no groups.
        shared_dim: hidden units of a further SwiGLU that every position uses; 0 for none.
        router_norm: the router's inputs are normalised, and scaled by a learned vector over the root of their number
            (Gemma 4); None for not.
        expert_scale: each expert's weight is multiplied by a learned number.
    """

    dim: int
    activation: Literal["silu", "gelu_tanh"] = "silu"
    num_experts: int
    num_experts_per_token: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    selection_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    shared_dim: int = 0
    router_norm: NormSpec | None = None
    expert_scale: bool = False

    def __post_init__(self):
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(f"{self.num_experts_per_token} experts a token must lie in 1..{self.num_experts}")
        if self.num_experts % self.num_groups or not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"{self.num_experts} experts in {self.num_groups} groups, of which {self.groups_per_token} a token: "
                "groups are of one size, and a token chooses among one of them to all"
            )
        if self.num_experts // self.num_groups * self.groups_per_token < self.num_experts_per_token:
            raise ValueError(f"{self.groups_per_token} groups hold fewer than {self.num_experts_per_token} experts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeSpec:
    """How the time becomes the vector that modulates layers: sines and cosines, two products, SiLU (arXiv 2006.11239).

    Args:
        input: "time": waves of 1000 t; "noise": of the total noise -log(1 - t), t being at most 0.999 (SEDD, arXiv
            2310.16834); "zero": of 0, in a network of that form that doesn't depend on the time (MDLM).
        waves: sines and cosines.
        hidden, dim: outputs of the first and of the second product; 0 for the network's width.
        bias: whether the products have biases.
    """

    input: Literal["time", "noise", "zero"] = "time"
    waves: int = 256
    hidden: int = 0
    dim: int = 0
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModulationSpec:
    """How the time's vector shifts, scales and gates hidden states (adaLN-zero, arXiv 2212.09748), by one product.

    Args:
        bias: whether the product has a bias.
        gate_offset: gates are this plus the product.
    """

    bias: bool = False
    gate_offset: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One transformer layer.

    Args:
        attention, mlp: its two parts.
        norm: before each part.
        post_norm: after each part, before the residual sum ("sandwich norms"); None for none.
        modulation: how the time shifts, scales and gates both parts; None for not.
        experts: a mixture beside the feed-forward: both read what attention left, each between norms of its own
            (`norm`, `post_norm`), and are summed before the layer's `post_norm` (Gemma 4). Its router reads hidden
            states before the norm. None for none.
        output_scale: whether what the layer gives is multiplied by a learned number.
    """

    attention: AttentionSpec
    mlp: MLPSpec | ExpertsSpec
    norm: NormSpec = NormSpec()
    post_norm: NormSpec | None = None
    modulation: ModulationSpec | None = None
    experts: ExpertsSpec | None = None
    output_scale: bool = False

    def __post_init__(self):
        if self.experts is not None and (isinstance(self.mlp, ExpertsSpec) or self.post_norm is None):
            raise ValueError("experts beside a feed-forward need a plain one, and norms after both")

    @property
    def mixture(self) -> ExpertsSpec | None:
        """Its experts, in place of a feed-forward or beside it; None for none."""
        return self.mlp if isinstance(self.mlp, ExpertsSpec) else self.experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfConditioningSpec:
    """How a network takes its previous prediction in: see `layers.SelfConditioning`.

    Args:
        mlp: what the expected embedding goes through.
        norm, sum_norm: of the expected embedding, and of its sum with the embedded tokens.
        canvas_only: clean text passes by it, norm included (DiffusionGemma).
    """

    mlp: MLPSpec
    norm: NormSpec = NormSpec()
    sum_norm: NormSpec = NormSpec()
    canvas_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers alike, one after the other.

    Args:
        layer: the layer.
        repeat: how many.
    """

    layer: LayerSpec
    repeat: int
