"""LLaDA and LLaDA 1.5 (arXiv 2502.09992, 2505.19223): a Llama under names of its own, with full attention and masks."""

from diffusion_lm.layouts import WholeRow
from diffusion_lm.models.base import TransformerSpec, Vocabulary
from diffusion_lm.models.family import ConfigReader, Described, layers_of, leaf, table, vector
from diffusion_lm.models.family import rope as rope_of
from diffusion_lm.models.weights import Leaf, Part
from diffusion_lm.nn.specs import AttentionSpec, LayerGroup, LayerSpec, MLPSpec, NormSpec

MODEL_TYPES = ("llada",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    for key, value in _ONLY.items():
        config.expect(key, value)
    config.ignore(
        "precision", "flash_attention", "alibi_bias_max", "rope_full_precision", "mlp_ratio", "bias_for_layer_norm"
    )
    config.ignore("attention_layer_norm_with_affine", "embedding_size")
    width, heads, norm = (
        config.size("d_model"),
        config.size("n_heads"),
        NormSpec(eps=float(config.take("rms_norm_eps", 1e-5))),
    )
    ids, tokens = config.size("embedding_size", config.size("vocab_size")), config.size("vocab_size")
    bias = config.expect("include_qkv_bias", False, True)
    attention = AttentionSpec(
        heads=heads,
        kv_heads=config.size("n_kv_heads", heads),
        head_dim=width // heads,
        qkv_bias=bias,
        rope=rope_of(config),
    )
    layer = LayerSpec(attention=attention, mlp=MLPSpec(dim=config.size("mlp_hidden_size")), norm=norm)
    vocabulary = Vocabulary(
        size=ids,
        mask=config.size("mask_token_id"),
        eos=config.take("eos_token_id", None),
        pad=config.take("pad_token_id", None),
        suppressed=tuple(range(tokens, ids)),  # rows that only pad the table
    )
    spec = TransformerSpec(
        width=width,
        groups=(LayerGroup(layer=layer, repeat=config.size("n_layers")),),
        final_norm=norm,
        tie_embeddings=config.expect("weight_tying", False, True),
        vocabulary=vocabulary,
    )
    return Described(spec=spec, layout=WholeRow(), trains_ar=False, context=config.size("max_sequence_length"))


_ONLY = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "rope": True,
    "scale_logits": False,
}


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    top, width, ids = "model.transformer.", spec.width, spec.vocabulary.size
    found = [
        table(("embedding",), f"{top}wte.weight", ids, width),
        vector(("final_norm", "scale"), f"{top}ln_f.weight", width),
    ]
    if not spec.tie_embeddings:
        found.append(table(("unembedding",), f"{top}ff_out.weight", ids, width))
    for i, layer in enumerate(layers_of(spec)):
        at, prefix, a, dim = f"layer_{i}", f"{top}blocks.{i}.", layer.attention, layer.mlp.dim
        heads, kv_heads = (width, a.heads, a.head_dim), (width, a.kv_heads, a.head_dim)

        def pair(first: str, second: str, shape: tuple[int, ...], prefix=prefix) -> list[Part]:
            return [
                Part(tensor=f"{prefix}{name}.weight", shape=shape, inputs=1, place=(slice(None), j))
                for j, name in enumerate((first, second))
            ]

        found += [
            vector((at, "attention_norm", "scale"), f"{prefix}attn_norm.weight", width),
            leaf((at, "attention", "query"), Part(tensor=f"{prefix}q_proj.weight", shape=heads, inputs=1)),
            leaf((at, "attention", "key_value"), *pair("k_proj", "v_proj", kv_heads)),
            leaf(
                (at, "attention", "output"),
                Part(tensor=f"{prefix}attn_out.weight", shape=(*heads[1:], width), inputs=2),
            ),
            vector((at, "mlp_norm", "scale"), f"{prefix}ff_norm.weight", width),
            leaf((at, "mlp", "gate_up"), *pair("ff_proj", "up_proj", (width, dim))),
            leaf((at, "mlp", "down"), Part(tensor=f"{prefix}ff_out.weight", shape=(dim, width), inputs=1)),
        ]
        if a.qkv_bias:
            bias = [
                Part(tensor=f"{prefix}{n}.bias", shape=kv_heads[1:], flat=True, place=(j,))
                for j, n in enumerate(("k_proj", "v_proj"))
            ]
            found += [
                vector((at, "attention", "query_bias"), f"{prefix}q_proj.bias", *heads[1:]),
                leaf((at, "attention", "key_value_bias"), *bias),
            ]
    return found


def is_buffer(name: str) -> bool:
    """None."""
    return False
