"""tiny-diffusion (github.com/nathan-barry/tiny-diffusion): characters, norms without weights, a table of times.

Its rope turns the other way: with the halves of a head's columns swapped, it is ours. Training masks a share of
(i + 1) / n at step i of n, which is row i of its table. (Its own sampler counts steps upward instead.)
"""

import json

import numpy as np

from diffusion_lm.layouts import WholeRow
from diffusion_lm.models.base import TransformerSpec, Vocabulary
from diffusion_lm.models.family import ConfigReader, Described, layers_of, leaf, reordered, table
from diffusion_lm.models.weights import Leaf, Part
from diffusion_lm.nn.specs import AttentionSpec, LayerGroup, LayerSpec, MLPSpec, NormSpec

MODEL_TYPES = ()
KEYS = ("sequence_len", "diffusion_steps", "n_embd")
_BEGIN, _END, _OTHER = 10, 4, 127  # a text follows a newline; no text holds the control character 4


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.ignore("context_len")  # how much of the last text its sampler keeps
    width, heads = config.size("n_embd"), config.size("n_head")
    if width % (2 * heads):
        raise ValueError(f"{config.source} sets n_embd={width}, which twice n_head={heads} must divide")
    norm = NormSpec(eps=float(np.finfo(np.float32).eps), scale=False)
    layer = LayerSpec(
        attention=AttentionSpec(heads=heads, kv_heads=heads, head_dim=width // heads, qk_norm=norm),
        mlp=MLPSpec(dim=4 * width, gated=False, activation="relu2"),
        norm=norm,
    )
    spec = TransformerSpec(
        width=width,
        groups=(LayerGroup(layer=layer, repeat=config.size("n_layer")),),
        final_norm=norm,
        embedding_norm=norm,
        learned_times=config.size("diffusion_steps"),
        vocabulary=Vocabulary(
            size=config.expect("vocab_size", 128), mask=config.expect("mask_token_id", 0), eos=_END, bos=_BEGIN
        ),
    )
    return Described(spec=spec, layout=WholeRow(), trains_ar=False, context=config.size("sequence_len"))


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    width, ids = spec.width, spec.vocabulary.size
    found = [
        table(("embedding",), "token_emb.weight", ids, width),
        table(("unembedding",), "output_head.weight", ids, width),
        leaf(("time_embedding",), Part(tensor="time_emb.weight", shape=(spec.learned_times, width))),
    ]
    for i, layer in enumerate(layers_of(spec)):
        at, prefix, a, dim = f"layer_{i}", f"blocks.{i}.", layer.attention, layer.mlp.dim
        halves = {"first": slice(a.head_dim // 2, None), "second": slice(0, a.head_dim // 2)}
        query, key = (
            reordered(f"{prefix}attn.{name}.weight", width, a.heads, a.head_dim, place=place, **halves)
            for name, place in (("c_q", ()), ("c_k", (0,)))
        )
        shape = (width, a.heads, a.head_dim)
        value = Part(tensor=f"{prefix}attn.c_v.weight", shape=shape, inputs=1, place=(slice(None), 1))
        up = Part(tensor=f"{prefix}mlp.c_fc.weight", shape=(width, dim), inputs=1, place=(slice(None), 0))
        found += [
            leaf((at, "attention", "query"), *query),
            leaf((at, "attention", "key_value"), *key, value),
            leaf(
                (at, "attention", "output"),
                Part(tensor=f"{prefix}attn.c_proj.weight", shape=(*shape[1:], width), inputs=2),
            ),
            leaf((at, "mlp", "gate_up"), up),
            leaf((at, "mlp", "down"), Part(tensor=f"{prefix}mlp.c_proj.weight", shape=(dim, width), inputs=1)),
        ]
    return found


def is_buffer(name: str) -> bool:
    """None."""
    return False


def companions() -> dict[str, bytes]:
    """The tokenizer's files: ids are ASCII codes. Other characters have no token (its code takes 127 for them)."""
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {chr(i): i for i in range(128)}, "unk_token": chr(_OTHER)},
    }  # fmt: skip
    settings = {"unk_token": chr(_OTHER)}
    return {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
