"""LLaDA-MoE (arXiv 2509.24389): a Llama with experts and norms of queries and keys, with full attention and masks."""

from diffusion_lm.layouts import WholeRow
from diffusion_lm.models import llama
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf
from diffusion_lm.nn.specs import ExpertsSpec, MLPSpec, NormSpec

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("lladamoe",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    for key, value in _ONLY.items():
        config.expect(key, value)
    norm = NormSpec(eps=float(config.take("rms_norm_eps", 1e-5)))
    attention = llama.attention_of(
        config,
        bias=config.expect("attention_bias", False, True),
        qk_norm=norm if config.expect("qk_layernorm", False, True) else None,
    )
    dense = MLPSpec(dim=config.size("dense_intermediate_size"))
    sparse = ExpertsSpec(
        dim=config.size("expert_intermediate_size"),
        num_experts=config.size("num_experts"),
        num_experts_per_token=config.size("num_experts_per_tok"),
        normalize=False,
    )
    layers = config.take("moe_layer_freq", [1] * config.size("num_hidden_layers"))
    if not isinstance(layers, list) or len(layers) != config.size("num_hidden_layers") or set(layers) - {0, 1}:
        raise ValueError(f"{config.source} sets moe_layer_freq={layers!r}; it must say 0 or 1 for each layer")
    mlps = [sparse if one else dense for one in layers]
    mask = config.size("mask_token_id", 156_895)
    return llama.described(config, attention, mlps=mlps, layout=WholeRow(), mask=mask)


_ONLY = {
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": False,
    "partial_rotary_factor": 1,
    "routed_scaling_factor": 1,
    "shared_expert_intermediate_size": None,
}


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
