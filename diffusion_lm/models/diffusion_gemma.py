"""DiffusionGemma's language model: Gemma 4's layers that encode clean text causally and denoise canvases both ways.

Layers hold a dense feed-forward and experts side by side. Vision towers are passed over: images aren't read.
"""

import functools
import math
from collections.abc import Sequence

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.layouts import Blocks
from diffusion_lm.models.base import TransformerSpec, Vocabulary
from diffusion_lm.models.family import (
    ConfigReader,
    Described,
    attention_leaves,
    decoder_leaves,
    grouped,
    leaf,
    mlp_leaves,
    vector,
)
from diffusion_lm.models.weights import Leaf, Part
from diffusion_lm.nn.specs import (
    AttentionSpec,
    ExpertsSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    RopeSpec,
    SelfConditioningSpec,
)
from diffusion_lm.processes.uniform import Uniform

MODEL_TYPES = ("diffusion_gemma",)
_KINDS = ("sliding_attention", "full_attention")
_ONLY = {
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
    "use_bidirectional_attention": "vision",
}  # fmt: skip


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.ignore("vision_config", "boi_token_id", "eoi_token_id", "image_token_id")
    config.expect("tie_word_embeddings", True)
    text = config.part("text_config")
    for key, value in _ONLY.items():
        text.expect(key, value)
    width, tokens, eps = text.size("hidden_size"), text.size("vocab_size"), float(text.take("rms_norm_eps", 1e-6))
    norm, bare = NormSpec(eps=eps), NormSpec(eps=eps, scale=False)
    mlp = MLPSpec(dim=text.size("intermediate_size"), activation="gelu_tanh")
    experts = ExpertsSpec(
        dim=text.size("moe_intermediate_size"),
        activation="gelu_tanh",
        num_experts=text.size("num_experts"),
        num_experts_per_token=text.size("top_k_experts"),
        router_norm=bare,
        expert_scale=True,
    )
    ropes, kinds = _ropes(text), text.take("layer_types")
    if len(kinds) != text.size("num_hidden_layers") or set(kinds) - set(_KINDS):
        raise ValueError(f"{text.source} sets layer_types={kinds}, not one of {' and '.join(_KINDS)} for each layer")
    window, heads = text.size("sliding_window"), text.size("num_attention_heads")
    sizes = {"head_dim": text.size("head_dim"), "num_key_value_heads": text.size("num_key_value_heads")}
    wide = {
        "head_dim": text.size("global_head_dim", sizes["head_dim"]),
        "num_key_value_heads": text.size("num_global_key_value_heads", sizes["num_key_value_heads"]),
    }
    own = text.take("per_layer_config", {})  # as transformers 5 says the same

    def layer(i: int, kind: str) -> LayerSpec:
        sliding = kind == _KINDS[0]
        found = (sizes if sliding else wide) | own.get(str(i), {})
        if odd := found.keys() - sizes.keys():
            raise ValueError(f"{text.source} sets {min(odd)} for layer {i}, which isn't implemented")
        attention = AttentionSpec(
            heads=heads, kv_heads=found["num_key_value_heads"], head_dim=found["head_dim"], tie_kv=not sliding,
            qk_norm=norm, value_norm=bare, rope=ropes[kind], score_scale=1.0, window=window if sliding else 0,
            whole_canvas=True,
        )  # fmt: skip
        return LayerSpec(attention=attention, mlp=mlp, norm=norm, post_norm=norm, experts=experts, output_scale=True)

    spec = TransformerSpec(
        width=width,
        groups=grouped(layer(i, kind) for i, kind in enumerate(kinds)),
        final_norm=norm,
        embedding_scale=width**0.5,
        tie_embeddings=True,
        logit_softcap=float(text.take("final_logit_softcapping", 0.0)),
        self_conditioning=SelfConditioningSpec(mlp=mlp, norm=norm, sum_norm=bare, canvas_only=True),
        vocabulary=Vocabulary(
            size=tokens, mask=tokens, **{name: text.take(f"{name}_token_id", None) for name in ("eos", "bos", "pad")}
        ),
    )
    context, canvas = text.size("max_position_embeddings", 131_072), config.size("canvas_length", 256)
    text.finish()
    layout = Blocks(size=canvas, prefix=Causal())
    return Described(spec=spec, layout=layout, trains_ar=False, context=context, process=Uniform())


def _ropes(text: ConfigReader) -> dict[str, RopeSpec]:
    parameters, found = text.part("rope_parameters"), {}
    for kind, rope_type in zip(_KINDS, ("default", "proportional"), strict=True):
        one = parameters.part(kind)
        one.expect("rope_type", rope_type)
        proportional = rope_type == "proportional"
        fraction = float(one.take("partial_rotary_factor")) if proportional else 1.0
        found[kind] = RopeSpec(theta=float(one.take("rope_theta")), fraction=fraction, proportional=proportional)
        one.finish()
    parameters.finish()
    return found


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    width, top, condition = spec.width, "model.decoder.", "model.decoder.self_conditioning."
    of_layer = functools.partial(_of_layer, width=width)
    found = decoder_leaves(spec, layer="model.decoder.layers.{}.".format, top=top, of_layer=of_layer)
    return [
        *found,
        vector(("self_conditioning", "soft_norm", "scale"), f"{condition}pre_norm.weight", width),
        *mlp_leaves(("self_conditioning",), spec.self_conditioning.mlp.dim, width, condition),
    ]


def _of_layer(path: Sequence[str], one: LayerSpec, prefix: str, width: int) -> list[Leaf]:
    x, at = one.experts, (*path, "experts")

    def stacked(name: str, *shape: int) -> list[Part]:
        """One part an expert, of a tensor [X, outputs, inputs]."""
        whole = x.num_experts, math.prod(shape[1:]), shape[0]
        one = functools.partial(Part, tensor=f"{prefix}experts.{name}", shape=shape, inputs=1, tensor_shape=whole)
        return [one(place=(n,), select=(n,)) for n in range(x.num_experts)]

    router = Part(tensor=f"{prefix}router.proj.weight", shape=(width, x.num_experts), inputs=1)
    # Files hold each layer's scale twice, the same.
    scales = prefix, prefix.replace("model.decoder.", "model.encoder.language_model.")
    return [
        *(vector((*path, ours, "scale"), f"{prefix}{theirs}.weight", width) for ours, theirs in _NORMS.items()),
        *attention_leaves(path, one, width, f"{prefix}self_attn."),
        *mlp_leaves(path, one.mlp.dim, width, f"{prefix}mlp."),
        Leaf(path=(*at, "router"), parts=(router,), keep_float32=True),
        vector((*at, "router_scale"), f"{prefix}router.scale", width),
        vector((*at, "expert_scale"), f"{prefix}router.per_expert_scale", x.num_experts),
        leaf((*at, "gate_up"), *stacked("gate_up_proj", width, 2, x.dim)),
        leaf((*at, "down"), *stacked("down_proj", x.dim, width)),
        leaf((*path, "output_scale"), *(Part(tensor=f"{name}layer_scalar", shape=(1,)) for name in scales)),
    ]


_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_branch_norm": "post_feedforward_layernorm_1",
    "experts_norm": "pre_feedforward_layernorm_2",
    "experts_branch_norm": "post_feedforward_layernorm_2",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def is_buffer(name: str) -> bool:
    """What reads images."""
    return name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision."))
