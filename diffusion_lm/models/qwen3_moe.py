"""Qwen3 with experts (arXiv 2505.09388): of many narrow feed-forwards each position uses a few."""

from diffusion_lm.models import llama, qwen3
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf
from diffusion_lm.nn.specs import ExpertsSpec, MLPSpec

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("qwen3_moe",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.ignore("router_aux_loss_coef")  # of its training
    dense = MLPSpec(dim=config.size("intermediate_size"))
    sparse = ExpertsSpec(
        dim=config.size("moe_intermediate_size"),
        num_experts=config.size("num_experts", config.take("num_local_experts", None)),
        num_experts_per_token=config.size("num_experts_per_tok"),
        normalize=config.expect("norm_topk_prob", False, True),
    )
    only, step = config.take("mlp_only_layers", []), config.size("decoder_sparse_step", 1)
    layers = range(config.size("num_hidden_layers"))
    mlps = [dense if i in only or (i + 1) % step else sparse for i in layers]
    return llama.described(config, qwen3.attention_of(config), mlps=mlps)


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
