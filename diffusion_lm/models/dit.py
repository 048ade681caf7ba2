"""The diffusion transformer that SEDD published, and MDLM and BD3-LM use: LayerNorm, rope, GELU, adaLN of the noise."""

from typing import Literal

import numpy as np

from diffusion_lm.models.base import TransformerSpec, Vocabulary
from diffusion_lm.models.family import ConfigReader, layers_of, leaf, table, vector
from diffusion_lm.models.weights import Leaf, Part
from diffusion_lm.nn.specs import AttentionSpec, LayerGroup, LayerSpec, MLPSpec, ModulationSpec, NormSpec, TimeSpec

_EOS = 50_256  # GPT-2's end of text, which begins texts as well
TOKENIZER = "GPT-2's, openai-community/gpt2 on the hub (SEDD, MDLM and BD3-LM trained on OpenWebText use it)"


def network(
    config: ConfigReader, *, tokens: int, width: str = "hidden_dim", time: Literal["noise", "zero"]
) -> TransformerSpec:
    """The network.

    Args:
        config: the keys n_heads, n_blocks, cond_dim, and
        width: the key of the width.
        tokens: of the tokenizer; the mask is the id behind them.
        time: see `TimeSpec`.
    """
    config.ignore("dropout")
    width, heads, norm = config.size(width), config.size("n_heads"), NormSpec(kind="layer", eps=1e-5)
    if width % (2 * heads):
        raise ValueError(f"{config.source} sets a width of {width}, which twice n_heads={heads} must divide")
    layer = LayerSpec(
        attention=AttentionSpec(heads=heads, kv_heads=heads, head_dim=width // heads),
        mlp=MLPSpec(dim=4 * width, gated=False, activation="gelu_tanh", bias=True),
        norm=norm,
        modulation=_MODULATION,
    )
    end, size = _EOS if tokens > _EOS else None, config.size("cond_dim")
    return TransformerSpec(
        width=width,
        groups=(LayerGroup(layer=layer, repeat=config.size("n_blocks")),),
        final_norm=norm,
        final_modulation=_MODULATION,
        head_bias=True,
        time=TimeSpec(input=time, hidden=size, dim=size, bias=True),
        vocabulary=Vocabulary(size=tokens, mask=tokens, eos=end, bos=end),
    )


_MODULATION = ModulationSpec(bias=True, gate_offset=0.0)


def leaves(spec: TransformerSpec, top: str = "backbone.") -> list[Leaf]:
    """What fills each parameter. top: what names begin with."""
    width, time, rows = spec.width, spec.time, spec.vocabulary.size + 1

    def modulation(path: tuple[str, ...], name: str, parts: int) -> list[Leaf]:
        return [
            leaf((*path, "kernel"), Part(tensor=f"{name}.weight", shape=(time.dim, parts, width), inputs=1)),
            vector((*path, "kernel_bias"), f"{name}.bias", parts, width),
        ]

    head = f"{top}output_layer.linear."
    found = [
        table(("embedding",), f"{top}vocab_embed.embedding", rows, width),
        leaf(("time_in",), Part(tensor=f"{top}sigma_map.mlp.0.weight", shape=(time.waves, time.hidden), inputs=1)),
        vector(("time_in_bias",), f"{top}sigma_map.mlp.0.bias", time.hidden),
        leaf(("time_out",), Part(tensor=f"{top}sigma_map.mlp.2.weight", shape=(time.hidden, time.dim), inputs=1)),
        vector(("time_out_bias",), f"{top}sigma_map.mlp.2.bias", time.dim),
        vector(("final_norm", "scale"), f"{top}output_layer.norm_final.weight", width),
        *modulation(("final_adaln",), f"{top}output_layer.adaLN_modulation", 2),
        leaf(
            ("unembedding",),
            Part(tensor=f"{head}weight", shape=(rows, width), place=(slice(0, rows), slice(0, width))),
            Part(tensor=f"{head}bias", shape=(rows,), place=(slice(0, rows), width)),
        ),
    ]
    for i, layer in enumerate(layers_of(spec)):
        at, prefix, a, dim = f"layer_{i}", f"{top}blocks.{i}.", layer.attention, layer.mlp.dim

        def fused(j: int, place: tuple, name=f"{prefix}attn_qkv.weight", shape=(width, a.heads, a.head_dim)) -> Part:
            """Queries, keys or values (j = 0, 1, 2)."""
            rows = slice(j * width, (j + 1) * width)
            return Part(
                tensor=name, shape=shape, inputs=1, place=place, select=(rows,), tensor_shape=(3 * width, width)
            )

        up, down = f"{prefix}mlp.0.", f"{prefix}mlp.2."
        output = Part(tensor=f"{prefix}attn_out.weight", shape=(a.heads, a.head_dim, width), inputs=2)
        found += [
            *modulation((at, "adaln"), f"{prefix}adaLN_modulation", 6),
            vector((at, "attention_norm", "scale"), f"{prefix}norm1.weight", width),
            leaf((at, "attention", "query"), fused(0, ())),
            leaf((at, "attention", "key_value"), fused(1, (slice(None), 0)), fused(2, (slice(None), 1))),
            leaf((at, "attention", "output"), output),
            vector((at, "mlp_norm", "scale"), f"{prefix}norm2.weight", width),
            leaf(
                (at, "mlp", "gate_up"), Part(tensor=f"{up}weight", shape=(width, dim), inputs=1, place=(slice(None), 0))
            ),
            leaf((at, "mlp", "gate_up_bias"), Part(tensor=f"{up}bias", shape=(dim,), place=(0,))),
            leaf((at, "mlp", "down"), Part(tensor=f"{down}weight", shape=(dim, width), inputs=1)),
            vector((at, "mlp", "down_bias"), f"{down}bias", width),
        ]
    return found


def buffers(spec: TransformerSpec, top: str = "backbone.") -> dict[str, np.ndarray]:
    """The rotary rates."""
    width = spec.groups[0].layer.attention.head_dim
    rates = 1.0 / np.float32(10_000.0) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    return {f"{top}rotary_emb.inv_freq": rates.astype(np.float32)}


def is_buffer(name: str) -> bool:
    """The rotary rates, and the range of times that BD3-LM's training draws from."""
    return name.endswith("rotary_emb.inv_freq") or name in ("sampling_eps_min", "sampling_eps_max")
