"""The world of `oracle` seen through noise on its tokens' vectors: what the best network says is a sum over texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.types import DenseLogits
from support.oracle import MASK, TEXTS, truth

ANGLES = np.array([0.0, 2.0, 4.1])
VECTORS = (np.sqrt(2) * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)).astype(np.float32)  # [3, 2], of size sqrt 2
PROCESS = Gaussian(noise=1.0, min_time=0.2, mask=MASK, width=2)


@dataclasses.dataclass(frozen=True)
class Seer:
    """`types.Denoise`, and what a canvas's sampler asks: log p(x_i = v | all vectors) [B, 4, 3], and `bumps` added."""

    process: Gaussian = PROCESS
    bumps: float = 0.0

    def __call__(self, tokens, t, *, embeddings, attention=None, positions=None, segment_ids=None):
        keep, more, _ = embeddings
        table = jnp.asarray(np.concatenate([VECTORS, np.ones((1, 2), np.float32)]))  # of the mask: nobody may look
        z = keep[..., None] * jnp.take(table, tokens, axis=0) + more
        alpha, sigma = self.process.alpha_sigma(t.reshape(-1, 1, 1, 1))
        away = z[:, :, None] - alpha * jnp.asarray(VECTORS)[None, None]
        fits = -jnp.sum(away**2, axis=-1) / (2 * sigma[..., 0] ** 2)  # [B, 4, 3]
        known = jnp.where(jax.nn.one_hot(tokens, 3) > 0, 0.0, -1e9)
        fits = jnp.where((keep == 1.0)[..., None], known, fits)
        texts = jnp.asarray(np.log(truth()), jnp.float32)[None]
        for i in range(TEXTS.shape[1]):
            texts = texts + jnp.take(fits[:, i], jnp.asarray(TEXTS[:, i]), axis=1)
        marginals = jnp.einsum("bn,niv->biv", jax.nn.softmax(texts), jnp.asarray(np.eye(3, dtype=np.float32)[TEXTS]))
        said = jnp.log(jnp.maximum(marginals, 1e-30)) + self.bumps * jnp.sin(5 * z @ jnp.asarray(VECTORS.T))
        return said if attention is None else DenseLogits(values=said, embeddings=table)

    def expected_embedding(self, logits):
        return jnp.einsum("biv,ve->bie", jax.nn.softmax(logits), jnp.asarray(VECTORS))
