"""Llama, as SmolLM2 and Llama 3 are (arXiv 2302.13971, 2407.21783): the network that most families differ from."""

from diffusion_lm.layouts import NoCanvas
from diffusion_lm.models.base import TransformerSpec, Vocabulary
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves, grouped, rope
from diffusion_lm.models.weights import Leaf
from diffusion_lm.nn.specs import AttentionSpec, LayerSpec, MLPSpec, NormSpec

MODEL_TYPES = ("llama",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.ignore("pretraining_tp")
    attention = attention_of(config, bias=config.expect("attention_bias", False, True))
    return described(config, attention, mlp_bias=config.expect("mlp_bias", False, True))


def attention_of(
    config: ConfigReader, *, bias: bool = False, out_bias: bool | None = None, qk_norm: NormSpec | None = None
) -> AttentionSpec:
    """Heads and rope of a config in Llama's words."""
    heads = config.size("num_attention_heads")
    return AttentionSpec(
        heads=heads,
        kv_heads=config.size("num_key_value_heads", heads),
        head_dim=config.size("head_dim", max(config.size("hidden_size") // heads, 1)),
        qkv_bias=bias,
        out_bias=bias if out_bias is None else out_bias,
        qk_norm=qk_norm,
        rope=rope(config),
    )


def described(
    config: ConfigReader, attention: AttentionSpec, *, mlp_bias: bool = False, mlps=None, layout=None, mask=None
) -> Described:
    """A network in Llama's words.

    Args:
        config: the file.
        attention: of all layers.
        mlp_bias: whether feed-forward layers have biases.
        mlps: the feed-forward of each layer, a `MLPSpec` or `ExpertsSpec`; None for intermediate_size in all of them.
        layout, mask: of a diffusion model; None: causal, a mask of its own.
    """
    config.expect("hidden_act", "silu")
    norm, ids = NormSpec(eps=float(config.take("rms_norm_eps", 1e-6))), config.size("vocab_size")
    if mlps is None:
        mlps = [MLPSpec(dim=config.size("intermediate_size"), bias=mlp_bias)] * config.size("num_hidden_layers")
    spec = TransformerSpec(
        width=config.size("hidden_size"),
        groups=grouped(LayerSpec(attention=attention, mlp=mlp, norm=norm) for mlp in mlps),
        final_norm=norm,
        tie_embeddings=bool(config.take("tie_word_embeddings", False)),
        vocabulary=vocabulary(config, ids, mask),
    )
    layout = NoCanvas() if layout is None else layout
    context = config.size("max_position_embeddings", 2048)
    return Described(spec=spec, layout=layout, trains_ar=isinstance(layout, NoCanvas), context=context)


def vocabulary(config: ConfigReader, ids: int, mask: int | None = None) -> Vocabulary:
    """The special ids of a config. mask None: a row of its own behind all tokens."""

    def one(key: str) -> int | None:
        found = config.take(key, None)
        return found[0] if isinstance(found, list) else found

    special = {name: one(f"{name}_token_id") for name in ("eos", "bos", "pad")}
    return Vocabulary(size=ids, mask=ids if mask is None else mask, **special)


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)


def is_buffer(name: str) -> bool:
    """Older files keep each layer's rotary rates."""
    return name.endswith("rotary_emb.inv_freq")
