"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm and biases; matrices lie as [inputs, outputs]."""

import re

from diffusion_lm.layouts import NoCanvas
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, layers_of, leaf, table, vector
from diffusion_lm.models.llama import vocabulary
from diffusion_lm.models.weights import Leaf, Part
from diffusion_lm.nn.specs import AttentionSpec, LayerGroup, LayerSpec, MLPSpec, NormSpec

MODEL_TYPES = ("gpt2",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    config.expect("scale_attn_weights", True)
    config.ignore("n_ctx", "reorder_and_upcast_attn", *(f"summary_{key}" for key in _SUMMARY))
    width, heads, context = config.size("n_embd"), config.size("n_head"), config.size("n_positions")
    if width % heads:
        raise ValueError(f"{config.source} sets n_embd={width}, which n_head={heads} must divide")
    norm = NormSpec(kind="layer", eps=float(config.take("layer_norm_epsilon", 1e-5)), bias=True)
    layer = LayerSpec(
        attention=AttentionSpec(
            heads=heads, kv_heads=heads, head_dim=width // heads, qkv_bias=True, out_bias=True, rope=None
        ),
        mlp=MLPSpec(dim=config.size("n_inner", 4 * width), gated=False, activation="gelu_tanh", bias=True),
        norm=norm,
    )
    spec = TransformerSpec(
        width=width,
        groups=(LayerGroup(layer=layer, repeat=config.size("n_layer")),),
        final_norm=norm,
        learned_positions=context,
        tie_embeddings=config.expect("tie_word_embeddings", True),
        vocabulary=vocabulary(config, config.size("vocab_size")),
    )
    return Described(spec=spec, layout=NoCanvas(), trains_ar=True, context=context)


_SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    top, width = "transformer.", spec.width
    found = [
        table(("embedding",), f"{top}wte.weight", spec.vocabulary.size, width),
        leaf(("position_embedding",), Part(tensor=f"{top}wpe.weight", shape=(spec.learned_positions, width))),
        *_norm(("final_norm",), f"{top}ln_f", width),
    ]
    for i, layer in enumerate(layers_of(spec)):
        at, prefix, dim = f"layer_{i}", f"{top}h.{i}.", layer.mlp.dim
        heads = (layer.attention.heads, layer.attention.head_dim)

        def fused(j: int, place: tuple, heads=heads, name=f"{prefix}attn.c_attn") -> tuple[Part, Part]:
            """Queries, keys or values (j = 0, 1, 2): its matrix and its bias."""
            columns = slice(j * width, (j + 1) * width)
            matrix = Part(
                tensor=f"{name}.weight", shape=(width, *heads), inputs=1, inputs_first=True,
                place=(slice(None), *place) if place else (),
                select=(slice(None), columns), tensor_shape=(width, 3 * width),
            )  # fmt: skip
            bias = {"flat": True, "place": place, "select": (columns,), "tensor_shape": (3 * width,)}
            return matrix, Part(tensor=f"{name}.bias", shape=heads, **bias)

        (query, query_bias), *key_value = fused(0, ()), fused(1, (0,)), fused(2, (1,))
        output = Part(tensor=f"{prefix}attn.c_proj.weight", shape=(*heads, width), inputs=2, inputs_first=True)
        up = Part(tensor=f"{prefix}mlp.c_fc.weight", shape=(width, dim), place=(slice(None), 0))
        up_bias = Part(tensor=f"{prefix}mlp.c_fc.bias", shape=(dim,), place=(0,))
        found += [
            *_norm((at, "attention_norm"), f"{prefix}ln_1", width),
            leaf((at, "attention", "query"), query),
            leaf((at, "attention", "query_bias"), query_bias),
            leaf((at, "attention", "key_value"), *(matrix for matrix, _ in key_value)),
            leaf((at, "attention", "key_value_bias"), *(bias for _, bias in key_value)),
            leaf((at, "attention", "output"), output),
            vector((at, "attention", "output_bias"), f"{prefix}attn.c_proj.bias", width),
            *_norm((at, "mlp_norm"), f"{prefix}ln_2", width),
            leaf((at, "mlp", "gate_up"), up),
            leaf((at, "mlp", "gate_up_bias"), up_bias),
            leaf((at, "mlp", "down"), Part(tensor=f"{prefix}mlp.c_proj.weight", shape=(dim, width))),
            vector((at, "mlp", "down_bias"), f"{prefix}mlp.c_proj.bias", width),
        ]
    return found


def _norm(path: tuple[str, ...], name: str, width: int) -> list[Leaf]:
    return [vector((*path, "scale"), f"{name}.weight", width), vector((*path, "bias"), f"{name}.bias", width)]


def own_name(name: str) -> str:
    """The hub's files omit the prefix "transformer."."""
    return name if name.startswith("transformer.") else f"transformer.{name}"


def is_buffer(name: str) -> bool:
    """Each layer's causal mask."""
    return re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name) is not None
