"""GGUF files in Hugging Face's terms: config keys, tensor names and row order; each tensor dequantised when read.

The `gguf` package reads the file and undoes Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, the K-quants, F16, BF16 and F32.
"""

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.convert.huggingface import Checkpoint

# GGUF's name -> the hub's, N being the layer.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.attn_q_norm": "model.layers.N.self_attn.q_norm",
    "blk.N.attn_k_norm": "model.layers.N.self_attn.k_norm",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
_BUFFERS = ("rope_freqs.weight",)
# general.architecture -> the hub's model_type, and whether q and k have their rows arranged for pairs of neighbours.
_ARCHITECTURES = {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
# Kinds of values: those of fixed size with their bytes, and the two whose length is stored.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
# What reading values of another type, length or size than GGUF's own ends in.
_NOT_AS_WRITTEN = (TypeError, IndexError, AttributeError, ArithmeticError, StopIteration)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, dequantised when it is read."""

    tensor: Any
    heads: int  # of a permuted q or k; 0: rows lie as on the hub

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self.tensor.shape))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """float32 [out, in] (or [n]), some of the first axis."""
        from gguf import quants

        found = quants.dequantize(self.tensor.data, self.tensor.tensor_type).reshape(self.shape)
        if self.heads:
            half = self.shape[0] // self.heads // 2
            found = found.reshape(self.heads, half, 2, -1).swapaxes(1, 2).reshape(self.shape)
        return np.asarray(found, np.float32)[rows]


def open_gguf(path: Path | str) -> Checkpoint:
    """A GGUF file as a `Checkpoint`. Raises FileNotFoundError, ImportError or ValueError with one line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs the gguf package: pip install -e '.[open]'") from error
    _check_counts(path)
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        sizes = [int(t.data_offset) + int(t.n_bytes) for t in reader.tensors]
    except Exception as error:  # the package raises whatever numpy does on a damaged file
        raise ValueError(f"{path} is no whole GGUF file ({type(error).__name__}): fetch it again") from None
    if max(sizes, default=0) > path.stat().st_size:
        raise ValueError(f"{path} ends before its tensors do: fetch it again")
    architecture = values.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"{path} is of architecture {architecture}; of GGUF files {known} can be read")
    try:
        config = _config(architecture, values, reader.tensors)
        return Checkpoint(
            source=path,
            config=config,
            tensors=_tensors(path, architecture, config, reader.tensors),
            companions=_companions(path, values),
        )
    except KeyError as error:
        raise ValueError(f"{path} doesn't say {error}: fetch it again") from None
    except _NOT_AS_WRITTEN as error:
        raise ValueError(f"{path} says what can't be ({type(error).__name__}: {error}): fetch it again") from None


def _check_counts(path: Path) -> None:
    """ValueError where the file says that it holds more than its bytes could.

    The package believes each length that it reads, and would allocate by it.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            magic, _, tensors, values = struct.unpack_from("<4sIQQ", content)
            if magic != b"GGUF" or tensors > len(content) // 8:
                raise ValueError("another head")
            at = 24
            for _ in range(values):
                at = _past(content, at, _STRING)
                at = _past(content, at + 4, *struct.unpack_from("<I", content, at))
    except (struct.error, KeyError, ValueError):
        raise ValueError(f"{path} is no whole GGUF file: fetch it again") from None


def _past(content: mmap.mmap, at: int, kind: int) -> int:
    """Where the value that begins at `at` ends. Raises ValueError past the file's end, KeyError for an unknown kind."""
    if kind == _STRING:
        end = at + 8 + struct.unpack_from("<Q", content, at)[0]
    elif kind == _ARRAY:
        of, count = struct.unpack_from("<IQ", content, at)
        at += 12
        if of == _STRING:
            for _ in range(count):  # each moves on by 8 bytes or more, so the file's end stops it
                at = _past(content, at, _STRING)
            return at
        end = at + count * _BYTES[of]
    else:
        end = at + _BYTES[kind]
    if end > len(content):
        raise ValueError("past the end")
    return end


def _config(architecture: str, values: Mapping[str, Any], tensors: list) -> dict[str, Any]:
    """config.json as the hub would have it."""
    kind, _ = _ARCHITECTURES[architecture]

    def said(key: str, default: Any = None) -> Any:
        return values[f"{architecture}.{key}"] if default is None else values.get(f"{architecture}.{key}", default)

    heads, width = said("attention.head_count"), said("embedding_length")
    names = {tensor.name for tensor in tensors}
    scaling = values.get(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise ValueError(
            f"{architecture}.rope.scaling.type={scaling} of a GGUF file isn't read: convert from safetensors"
        )
    return {
        "architectures": [{"llama": "LlamaForCausalLM"}.get(kind, f"{kind.capitalize()}ForCausalLM")],
        "model_type": kind,
        "vocab_size": next(int(t.shape[1]) for t in tensors if t.name == "token_embd.weight"),
        "hidden_size": width,
        "intermediate_size": said("feed_forward_length"),
        "num_hidden_layers": said("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said("attention.head_count_kv", heads),
        "head_dim": said("attention.key_length", width // heads),
        "hidden_act": "silu",
        "rms_norm_eps": float(np.float32(said("attention.layer_norm_rms_epsilon")).astype(str)),
        "rope_theta": float(said("rope.freq_base", 10_000.0)),
        "rope_scaling": None,
        "max_position_embeddings": said("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names and kind != "qwen2",
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _tensors(path: Path, architecture: str, config: Mapping[str, Any], tensors: list) -> dict[str, _Tensor]:
    permuted = _ARCHITECTURES[architecture][1]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if permuted else {}
    found = {}
    for tensor in tensors:
        if tensor.name in _BUFFERS:
            continue
        name, _, kind = tensor.name.rpartition(".")
        parts = name.split(".")
        number = parts[1] if parts[0] == "blk" and len(parts) > 2 else ""
        general = f"blk.N.{'.'.join(parts[2:])}" if number else name
        if general not in _NAMES or kind not in ("weight", "bias"):
            raise ValueError(f"{path} holds {tensor.name}, which a network of architecture {architecture} doesn't have")
        found[f"{_NAMES[general].replace('N', number)}.{kind}"] = _Tensor(tensor, heads.get(parts[-1], 0))
    return found


def _companions(path: Path, values: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer and what goes with it, as the hub's files."""
    kind = values.get("tokenizer.ggml.model")
    found = {}
    if kind == "gpt2":
        found["tokenizer.json"] = json.dumps(_byte_level_bpe(path, values), ensure_ascii=False).encode()
    elif kind is not None:
        raise ValueError(f"{path} has a tokenizer of kind {kind}; of GGUF files byte-level BPE can be read")
    tokens = values.get("tokenizer.ggml.tokens", [])
    ids = {key: values.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "unknown")}
    named = {
        {"padding": "pad", "unknown": "unk"}.get(key, key) + "_token": tokens[i]
        for key, i in ids.items()
        if i is not None and i < len(tokens)
    }
    template = values.get("tokenizer.chat_template")
    settings = named | {"add_bos_token": bool(values.get("tokenizer.ggml.add_bos_token", False))}
    found["tokenizer_config.json"] = json.dumps(settings | ({"chat_template": template} if template else {})).encode()
    return found


# How text is cut before merges, by tokenizer.ggml.pre, as each model's own tokenizer.json has it.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _BYTE_LEVEL | {"use_regex": False}]


_PRE = {
    "smollm": [_DIGITS, _BYTE_LEVEL],
    "gpt-2": [_BYTE_LEVEL],
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_LLAMA3.replace("{1,3}", "")),
}


def _byte_level_bpe(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE."""
    pre = values.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _PRE:
        raise ValueError(f"{path} cuts text in the way {pre!r}; known are {', '.join(_PRE)}: convert from safetensors")
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    special = {3: True, 4: False}  # control tokens, and those that a user defined
    added = [
        {
            "id": i, "content": token, "special": special[kind],
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in special
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[pre]},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in values["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip
