"""LLaDA2.0 and 2.1 (arXiv 2512.15745): experts chosen by groups, and blocks of masks after clean blocks.

The two are one network; 2.1 also edits tokens that stand.
"""

from collections.abc import Sequence

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.layouts import Blocks
from diffusion_lm.models import llama
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import (
    ConfigReader,
    Described,
    decoder_leaves,
    feed_forward_leaves,
    leaf,
    rope,
    vector,
)
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf, Part
from diffusion_lm.nn.specs import AttentionSpec, ExpertsSpec, LayerSpec, MLPSpec, NormSpec

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("llada2_moe",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    for key, value in _ONLY.items():
        config.expect(key, value)
    config.ignore("output_dropout", "router_dtype", "sliding_window", "max_window_layers")
    norm, heads = NormSpec(eps=float(config.take("rms_norm_eps", 1e-6))), config.size("num_attention_heads")
    head_dim, fraction = config.size("head_dim"), float(config.take("partial_rotary_factor", 1.0))
    if (turned := config.take("rotary_dim", int(head_dim * fraction))) != int(head_dim * fraction):
        raise ValueError(f"{config.source} sets rotary_dim={turned}, which isn't partial_rotary_factor of head_dim")
    attention = AttentionSpec(
        heads=heads,
        kv_heads=config.size("num_key_value_heads", heads),
        head_dim=head_dim,
        qk_norm=norm,
        rope=rope(config, fraction=fraction),
    )
    dim, each = config.size("moe_intermediate_size"), config.size("num_experts_per_tok")
    sparse = ExpertsSpec(
        dim=dim,
        num_experts=config.size("num_experts"),
        num_experts_per_token=each,
        scoring="sigmoid",
        normalize=each > 1,
        scale=float(config.take("routed_scaling_factor", 1.0)),
        selection_bias=config.expect("moe_router_enable_expert_bias", True, False),
        num_groups=config.size("n_group", 1),
        groups_per_token=config.size("topk_group", 1),
        shared_dim=dim * config.take("num_shared_experts", 0),
    )
    dense, first = MLPSpec(dim=config.size("intermediate_size")), config.take("first_k_dense_replace", 0)
    mlps = [dense if i < first else sparse for i in range(config.size("num_hidden_layers"))]
    size, mask = config.size("block_size", 32), config.size("mask_token_id", 156_895)
    layout = Blocks(size=size, prefix=BlockCausal(size))
    return llama.described(config, attention, mlps=mlps, layout=layout, mask=mask)


_ONLY = {
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_sliding_window": False,
}


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    width = spec.width

    def of_layer(path: Sequence[str], one: LayerSpec, prefix: str) -> list[Leaf]:
        a, at, name = one.attention, (*path, "attention"), f"{prefix}attention.query_key_value.weight"
        edges = [0, a.heads, a.heads + a.kv_heads, a.heads + 2 * a.kv_heads]

        def fused(i: int, place: tuple = ()) -> Part:
            """Queries, keys or values: rows of one tensor."""
            rows = slice(edges[i] * a.head_dim, edges[i + 1] * a.head_dim)
            shape, whole = (width, edges[i + 1] - edges[i], a.head_dim), (edges[3] * a.head_dim, width)
            return Part(tensor=name, shape=shape, inputs=1, place=place, select=(rows,), tensor_shape=whole)

        output = Part(tensor=f"{prefix}attention.dense.weight", shape=(a.heads, a.head_dim, width), inputs=2)
        return [
            vector((*path, "attention_norm", "scale"), f"{prefix}input_layernorm.weight", width),
            leaf((*at, "query"), fused(0)),
            leaf((*at, "key_value"), fused(1, (slice(None), 0)), fused(2, (slice(None), 1))),
            leaf((*at, "output"), output),
            vector((*at, "query_norm", "scale"), f"{prefix}attention.query_layernorm.weight", a.head_dim),
            vector((*at, "key_norm", "scale"), f"{prefix}attention.key_layernorm.weight", a.head_dim),
            vector((*path, "mlp_norm", "scale"), f"{prefix}post_attention_layernorm.weight", width),
            *feed_forward_leaves(path, one, width, f"{prefix}mlp."),
        ]

    return decoder_leaves(spec, embedding="word_embeddings", of_layer=of_layer)
