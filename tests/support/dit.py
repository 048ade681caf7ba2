"""The published transformer of MDLM, BD3-LM and ReMDM, forward only, in numpy: rebuilds logits that were not stored."""

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HEADS = 4


def weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file."""
    return {name.removeprefix("backbone."): array for name, array in load_file(path).items()}


def logits(w: dict[str, np.ndarray], tokens: np.ndarray, sigma: np.ndarray, mask=True, positions=None) -> np.ndarray:
    """tokens [B, L], sigma [B] -> [B, L, rows]; mask [L, L] says who sees whom, positions [L] where they stand."""
    x = w["vocab_embed.embedding"].astype(np.float64)[tokens]
    positions = np.arange(tokens.shape[1]) if positions is None else positions
    frequency = np.exp(-math.log(10_000) * np.arange(128) / 128)
    waves = np.concatenate([f(sigma[:, None] * frequency) for f in (np.cos, np.sin)], axis=-1)
    c = _silu(_linear(w, "sigma_map.mlp.2", _silu(_linear(w, "sigma_map.mlp.0", waves))))[:, None]
    angles = positions[:, None] * w["rotary_emb.inv_freq"]
    for i in range(sum(name.endswith("attn_qkv.weight") for name in w)):
        x = _block(w, f"blocks.{i}.", x, c, angles, mask)
    shift, scale = np.split(_linear(w, "output_layer.adaLN_modulation", c), 2, axis=-1)
    return _linear(w, "output_layer.linear", _norm(w, "output_layer.norm_final", x) * (1 + scale) + shift)


def _block(w, at, x, c, angles, mask):
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = np.split(_linear(w, f"{at}adaLN_modulation", c), 6, axis=-1)
    qkv = _linear(w, f"{at}attn_qkv", _norm(w, f"{at}norm1", x) * (1 + scale) + shift)
    q, k, v = np.moveaxis(qkv.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
    scores = np.einsum("blhd,bmhd->bhlm", _turned(q, angles), _turned(k, angles)) / math.sqrt(q.shape[-1])
    scores = np.where(mask, scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    seen = np.einsum("bhlm,bmhd->blhd", scores / scores.sum(axis=-1, keepdims=True), v).reshape(x.shape)
    x = x + gate * _linear(w, f"{at}attn_out", seen)
    inner = _linear(w, f"{at}mlp.0", _norm(w, f"{at}norm2", x) * (1 + scale_mlp) + shift_mlp)
    inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return x + gate_mlp * _linear(w, f"{at}mlp.2", inner)


def _linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def _norm(w, name, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]


def _silu(x):
    return x / (1 + np.exp(-x))


def _turned(x, angles):
    """Rotary positions: the first half of a head against its second."""
    one, two = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
