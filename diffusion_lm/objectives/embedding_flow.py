"""Flow matching, or Gaussian diffusion, of the network's own token embeddings.

The training loss is not the reported bound. Training minimises the cross-entropy of x_0 at uniform times (score
interpolation, CDCD, arXiv 2211.15089): its optimum is p(x_0 | z_t), and with it the velocity and the score. Minimising
the bound fails, because the embeddings are learned and the bound's weight has no limit where noise is small.

Half of the rows show a part of their text without noise. With one noise level for all positions, a small network learns
nothing but each embedding's own token: where neighbours are legible, so is the position itself (CANDI, arXiv
2510.22510).

All embeddings have one norm, so that they can neither grow out of the noise nor vanish. Two equal embeddings can't be
told apart at any time, which the cross-entropy penalises.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion_lm.layouts import WholeRow
from diffusion_lm.objectives.base import Objective, draw_times, noised_mask, per_target, predict
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.types import Batch, Denoise, LogitsHead, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingFlowLoss(Objective):
    """Cross-entropy of x_0 given Gaussian noise on embeddings (CDCD, arXiv 2211.15089); the whole row is one canvas."""

    layout = WholeRow()
    trains_ar = False

    def __call__(self, denoise: Denoise, process: Gaussian, key: Array, batch: Batch) -> dict[str, Loss]:
        """-log p(x_0 | z_t) of noised positions, t uniform between the process's `min_time` and 1."""
        batch, (time_key, noise_key, clean_key) = self.layout.prepare(batch), jax.random.split(key, 3)
        t = _uniform_times(process, time_key, batch) * (1.0 - process.min_time) + process.min_time
        partly = batch.replace(context_mask=batch.context_mask | _clean_mask(clean_key, batch.tokens))
        head = self._predict(denoise, process, noise_key, partly, t)
        total = head.cross_entropy(batch.tokens, noised_mask(partly).astype(jnp.float32))
        return {"canvas": per_target(head, total, batch)}

    def elbo(self, denoise: Denoise, process: Gaussian, key: Array, batch: Batch) -> dict[str, Loss]:
        """The diffusion's bound, -1/2 integral of SNR'(t) E|e - m|^2 dt + E[-log p(x_0 | z_min)] (VDM, arXiv
        2107.00630, continuous time). Nothing of the text is left at t = 1, so the prior costs nothing.

        For its value only: no gradient reaches m. Times have density ~ 1/t, as errors at small t are rare and heavy.
        """
        batch, (time_key, noise_key, last_key) = self.layout.prepare(batch), jax.random.split(key, 3)
        u, scored = _uniform_times(process, time_key, batch), noised_mask(batch).astype(jnp.float32)
        t = process.min_time ** (1.0 - u)
        head = self._predict(denoise, process, noise_key, batch, t)
        error = jnp.take(head.embeddings, batch.tokens, axis=0) - head.expected_embedding()
        cost = -math.log(process.min_time) * t * process.snr_rate(t) * jnp.sum(error * error, axis=-1)
        last = self._predict(denoise, process, last_key, batch, jnp.full_like(t, process.min_time))
        total = jnp.sum(cost * scored) + last.cross_entropy(batch.tokens, scored)
        return {"canvas": per_target(head, total, batch)}

    def _predict(self, denoise: Denoise, process: Gaussian, key: Array, batch: Batch, t: Array) -> LogitsHead:
        embeddings = process.corrupt_embeddings(key, ~batch.context_mask, t)
        return predict(denoise, self.layout, batch, t, batch.tokens, embeddings)[0]


def _uniform_times(process: Gaussian, key: Array, batch: Batch) -> Array:
    """float32 [B, 1] in (0, 1]. Raises ValueError for a process that noises tokens."""
    if not isinstance(process, Gaussian):
        raise ValueError(
            f"EmbeddingFlowLoss noises embeddings, {type(process).__name__} tokens: set process=Gaussian()"
        )
    return draw_times(key, (batch.tokens.shape[0], 1))


def _clean_mask(key: Array, tokens: Array) -> Array:
    """bool [B, L]: in half of the rows a random share of the positions, in the others none."""
    some_key, share_key, which_key = jax.random.split(key, 3)
    shape = (tokens.shape[0], 1)
    share = jax.random.uniform(share_key, shape) * jax.random.bernoulli(some_key, 0.5, shape)
    return jax.random.uniform(which_key, tokens.shape) < share
