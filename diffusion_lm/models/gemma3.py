"""Gemma 3's language model (arXiv 2503.19786): layers with a sliding window between those that attend to all.

Its norms multiply by 1 + weight, and stand before and after both parts of a layer.
"""

from collections.abc import Sequence

from diffusion_lm.layouts import NoCanvas, WholeRow
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import (
    ConfigReader,
    Described,
    attention_leaves,
    decoder_leaves,
    grouped,
    mlp_leaves,
    rope,
    vector,
)
from diffusion_lm.models.llama import is_buffer, vocabulary
from diffusion_lm.models.weights import Leaf
from diffusion_lm.nn.specs import AttentionSpec, LayerSpec, MLPSpec, NormSpec, RopeSpec

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves", "own_name"]
MODEL_TYPES = ("gemma3_text",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    both_ways = config.expect("use_bidirectional_attention", False, True)
    width, context = config.size("hidden_size"), config.size("max_position_embeddings", 131_072)
    norm = NormSpec(eps=float(config.take("rms_norm_eps", 1e-6)), offset=1.0)
    ropes, bias, window = _ropes(config), config.expect("attention_bias", False, True), config.size("sliding_window")
    # As transformers counts it: half the window on each side.
    windows = {"full_attention": 0, "sliding_attention": window // 2 + 1 if both_ways else window}
    heads = {
        "heads": config.size("num_attention_heads"),
        "kv_heads": config.size("num_key_value_heads"),
        "head_dim": config.size("head_dim", 256),
    }
    scale = float(config.take("query_pre_attn_scalar", 256)) ** -0.5
    mlp = MLPSpec(dim=config.size("intermediate_size"), activation="gelu_tanh")

    def layer(kind: str) -> LayerSpec:
        if kind not in windows:
            raise ValueError(f"{config.source} has a layer of {kind!r}; {' and '.join(windows)} are implemented")
        own = {"rope": ropes[kind], "window": windows[kind], "qk_norm": norm, "score_scale": scale}
        return LayerSpec(
            attention=AttentionSpec(**heads, **own, qkv_bias=bias, out_bias=bias), mlp=mlp, norm=norm, post_norm=norm
        )

    spec = TransformerSpec(
        width=width,
        groups=grouped(layer(kind) for kind in _kinds(config)),
        final_norm=norm,
        embedding_scale=width**0.5,
        tie_embeddings=bool(config.take("tie_word_embeddings", True)),
        logit_softcap=float(config.take("final_logit_softcapping", 0.0)),
        vocabulary=vocabulary(config, config.size("vocab_size")),
    )
    layout = WholeRow() if both_ways else NoCanvas()
    return Described(spec=spec, layout=layout, trains_ar=not both_ways, context=context)


def _ropes(config: ConfigReader) -> dict[str, RopeSpec]:
    """By the kind of layer; in one of two spellings."""
    local, parameters = config.take("rope_local_base_freq", 10_000.0), config.take("rope_parameters", {})
    if not parameters:
        full = rope(config, default_theta=1e6)
        return {"full_attention": full, "sliding_attention": RopeSpec(theta=float(local))}
    one = {kind: ConfigReader({"rope_parameters": found}, config.source) for kind, found in parameters.items()}
    return {kind: rope(reader) for kind, reader in one.items()}


def _kinds(config: ConfigReader) -> list[str]:
    count, every = config.size("num_hidden_layers"), config.take("_sliding_window_pattern", 6)
    every = config.size("sliding_window_pattern", every)
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    kinds = config.take("layer_types", kinds)
    if len(kinds) != count:
        raise ValueError(f"{config.source} has {len(kinds)} layer_types for num_hidden_layers={count}")
    return kinds


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""

    def of_layer(path: Sequence[str], one: LayerSpec, prefix: str) -> list[Leaf]:
        return [
            *(
                vector((*path, ours, "scale"), f"{prefix}{theirs}.weight", spec.width)
                for ours, theirs in _NORMS.items()
            ),
            *attention_leaves(path, one, spec.width, f"{prefix}self_attn."),
            *mlp_leaves(path, one.mlp.dim, spec.width, f"{prefix}mlp."),
        ]

    return decoder_leaves(spec, of_layer=of_layer)


_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def own_name(name: str) -> str:
    """Files of the multimodal models say which part is the language model."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")
