"""The published diffusion transformer of MDLM, BD3-LM, ReMDM and SEDD: a forward pass in float64 NumPy, a reference.

All sizes come from the config (heads) and from the shapes of the weights (layers, widths, vocabulary).
"""

import math

import numpy as np


class DiT:
    """A transformer with adaptive layer norm (adaLN) conditioned on the noise level sigma.

    Args:
        config: config.json of the family; `n_heads` is read, in SEDD's under "model".
        weights: name -> array, matrices [out, in], with or without the prefix "backbone.".
    """

    def __init__(self, *, config: dict, weights: dict[str, np.ndarray]):
        self.heads = config.get("model", config)["n_heads"]
        self.weights = {name.removeprefix("backbone."): array for name, array in weights.items()}
        self.layers = sum(name.endswith("attn_qkv.weight") for name in self.weights)

    def logits(self, tokens: np.ndarray, sigma: np.ndarray, mask=True, positions=None) -> np.ndarray:
        """Predicts every position.

        Args:
            tokens: int [B, L].
            sigma: float [B], total noise; zeros for a network without time conditioning.
            mask: bool [L, L], True where query row may attend to key column.
            positions: int [L] for the rotary embedding; 0..L-1 by default.

        Returns:
            float64 [B, L, rows of the output layer].
        """
        x = self.weights["vocab_embed.embedding"].astype(np.float64)[tokens]
        positions = np.arange(tokens.shape[1]) if positions is None else positions
        half = self.weights["sigma_map.mlp.0.weight"].shape[1] // 2
        frequency = np.exp(-math.log(10_000) * np.arange(half) / half)
        waves = np.concatenate([f(sigma[:, None] * frequency) for f in (np.cos, np.sin)], axis=-1)
        c = _silu(self._linear("sigma_map.mlp.2", _silu(self._linear("sigma_map.mlp.0", waves))))[:, None]
        angles = positions[:, None] * self.weights["rotary_emb.inv_freq"]
        for i in range(self.layers):
            x = self._block(f"blocks.{i}.", x, c, angles, mask)
        shift, scale = np.split(self._linear("output_layer.adaLN_modulation", c), 2, axis=-1)
        return self._linear("output_layer.linear", self._norm("output_layer.norm_final", x) * (1 + scale) + shift)

    def _block(self, at, x, c, angles, mask):
        modulation = np.split(self._linear(f"{at}adaLN_modulation", c), 6, axis=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        qkv = self._linear(f"{at}attn_qkv", self._norm(f"{at}norm1", x) * (1 + scale) + shift)
        q, k, v = np.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)
        scores = np.einsum("blhd,bmhd->bhlm", _rotated(q, angles), _rotated(k, angles)) / math.sqrt(q.shape[-1])
        scores = np.where(mask, scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = np.einsum("bhlm,bmhd->blhd", scores / scores.sum(axis=-1, keepdims=True), v).reshape(x.shape)
        x = x + gate * self._linear(f"{at}attn_out", attended)
        inner = self._linear(f"{at}mlp.0", self._norm(f"{at}norm2", x) * (1 + scale_mlp) + shift_mlp)
        inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return x + gate_mlp * self._linear(f"{at}mlp.2", inner)

    def _linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def _norm(self, name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * self.weights[f"{name}.weight"]


def _silu(x):
    return x / (1 + np.exp(-x))


def _rotated(x, angles):
    """Rotary positions, half-split: dimension i pairs with i + D / 2."""
    one, two = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
