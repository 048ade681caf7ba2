"""MD4 (arXiv 2406.04329), for text: layers without scales, modulated by the time; rope of neighbouring columns.

Tensors are those of its Flax parameters, names joined by dots. MD4 keeps alpha(t) `schedule_eps` away from 0 and 1,
which our schedules needn't.
"""

import re

from diffusion_lm.layouts import WholeRow
from diffusion_lm.models.base import TransformerSpec, Vocabulary
from diffusion_lm.models.family import ConfigReader, Described, layers_of, leaf, reordered, table, vector
from diffusion_lm.models.weights import Leaf, Part
from diffusion_lm.nn.specs import AttentionSpec, LayerGroup, LayerSpec, MLPSpec, ModulationSpec, NormSpec, TimeSpec
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.schedules import Cosine, Linear, Polynomial, Schedule

MODEL_TYPES = ("md4",)
TOKENIZER = "one id a character for text8, GPT-2's for OpenWebText"


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    only = {"time_features": "t", "mlp_type": "swiglu", "cond_type": "adaln_zero", "outside_embed": True, "classes": 0}
    for key, value in only.items():
        config.expect(key, value)
    config.ignore("depth_scaled_init", "dropout_rate", "schedule_eps")
    tokens, shape = config.size("vocab_size"), config.take("data_shape")
    if len(shape) != 1:
        raise ValueError(f"{config.source} sets data_shape={shape}; only text, of one number, is implemented")
    features, heads = config.size("feature_dim"), config.size("num_heads")
    width, norm = features * heads, NormSpec(kind="layer", eps=1e-5, scale=False)
    modulation = ModulationSpec(bias=True, gate_offset=0.0)
    layer = LayerSpec(
        attention=AttentionSpec(heads=heads, kv_heads=heads, head_dim=features),
        mlp=MLPSpec(dim=-(-(8 * width // 3) // 32) * 32),
        norm=norm,
        modulation=modulation,
    )
    spec = TransformerSpec(
        width=width,
        groups=(LayerGroup(layer=layer, repeat=config.size("n_layers")),),
        final_norm=norm,
        final_modulation=modulation,
        embedding_width=features,
        time=TimeSpec(waves=features, hidden=4 * features, dim=features, bias=True),
        vocabulary=Vocabulary(size=tokens, mask=config.expect("mask_id", tokens)),
    )
    process = Absorbing(schedule=_schedule(config))
    return Described(spec=spec, layout=WholeRow(), trains_ar=False, context=shape[0], process=process)


def _schedule(config: ConfigReader) -> Schedule:
    name = config.take("noise_schedule", "linear")
    if power := re.fullmatch(r"poly([\d.]+)", name):
        return Polynomial(power=float(power[1]))
    return Cosine() if config.expect("noise_schedule", "linear", "cosine") == "cosine" else Linear()


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    top, width, features, ids = "classifier.", spec.width, spec.embedding_width, spec.vocabulary.size

    def affine(path: tuple[str, ...], name: str, *shape: int) -> list[Leaf]:
        kernel = Part(tensor=f"{name}.kernel", shape=shape, inputs=1, inputs_first=True)
        return [leaf(path, kernel), vector((*path[:-1], f"{path[-1]}_bias"), f"{name}.bias", *shape[1:])]

    main, condition = f"{top}Transformer_0.", f"{top}CondEmbedding_0."
    head = Part(tensor=f"{main}Dense_2.kernel", shape=(ids, width), inputs=1, place=(slice(0, ids),))
    found = [
        table(("embedding",), f"{top}Embed_0.embedding", ids + 1, features),
        *affine(("embedding_projection",), f"{main}Dense_0", features, width),
        *affine(("time_in",), f"{condition}dense0", features, spec.time.hidden),
        *affine(("time_out",), f"{condition}Dense_0", spec.time.hidden, features),
        *affine(("final_adaln", "kernel"), f"{main}Dense_1", features, 2, width),
        leaf(("unembedding",), head),
    ]
    for i, layer in enumerate(layers_of(spec)):
        at, prefix, a, dim = f"layer_{i}", f"{main}TransformerBlock_{i}.", layer.attention, layer.mlp.dim

        def matrix(name: str, *shape: int, place: tuple = (), inputs: int = 1, prefix=prefix) -> Part:
            return Part(tensor=f"{prefix}{name}.kernel", shape=shape, inputs=inputs, inputs_first=True, place=place)

        pairs = {"first": slice(0, None, 2), "second": slice(1, None, 2), "inputs_first": True}
        query, key = (
            reordered(f"{prefix}attention.{name}.kernel", width, a.heads, a.head_dim, place=place, **pairs)
            for name, place in (("wq", ()), ("wk", (0,)))
        )
        value = matrix("attention.wv", width, a.heads, a.head_dim, place=(slice(None), 1))
        gate, up = (matrix(f"feed_forward.{n}", width, dim, place=(slice(None), j)) for j, n in enumerate(("w1", "w3")))
        found += [
            *affine((at, "adaln", "kernel"), f"{prefix}Dense_0", features, 6, width),
            leaf((at, "attention", "query"), *query),
            leaf((at, "attention", "key_value"), *key, value),
            leaf((at, "attention", "output"), matrix("attention.wo", a.heads, a.head_dim, width, inputs=2)),
            leaf((at, "mlp", "gate_up"), gate, up),
            leaf((at, "mlp", "down"), matrix("feed_forward.w2", dim, width)),
        ]
    return found


def is_buffer(name: str) -> bool:
    """None."""
    return False
