"""Continuous flow matching, or Gaussian diffusion, of the network's own vectors of tokens.

What is trained and what is reported differ. Trained is the cross-entropy of x_0 at every time alike (score
interpolation, CDCD, arXiv 2211.15089): its optimum is p(x_0 | z_t), hence the velocity and the score. Reported, as
`bound`, is the likelihood bound of the diffusion on the same path. The bound is no good to train: the vectors are
learned, and where their noise is least it counts without limit.

What context says is hard to find under one noise for all: where neighbours can be read the position itself can be, too,
and where it can't, neither can they (CANDI, arXiv 2510.22510). Trained so alone, a small network stays with what each
vector says by itself. So half of the rows are shown a share of their text, which a text to be filled in is as well.

What keeps learned vectors apart: all are of one size, so that neither can noise drown in them nor can they vanish; and
two that coincide can't be told apart at any time, which the cross-entropy charges for.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import Full
from diffusion_lm.layouts import WholeRow
from diffusion_lm.objectives.elbo import draw_times, one_text
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.types import Batch, Denoise, LogitsHead, Loss, loss_of

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingFlowLoss:
    """The whole row is one canvas, as in `elbo.ELBO`, under Gaussian noise."""

    layout = WholeRow()
    trains_ar = False

    def __call__(self, denoise: Denoise, process: Gaussian, key: Array, batch: Batch) -> dict[str, Loss]:
        """-log p(x_0 | z_t), t even between the process's `least` and 1; of rows that `_shown` shows in part, what is
        left."""
        batch, (time_key, noise_key, show_key) = one_text(batch), jax.random.split(key, 3)
        t = _evenly(process, time_key, batch) * (1.0 - process.least) + process.least
        shown = batch.replace(context_mask=batch.context_mask | _shown(show_key, batch.tokens))
        head = _read(denoise, process, noise_key, shown, t)
        return _loss(batch, head, head.cross_entropy(batch.tokens, _scored(shown).astype(jnp.float32)))

    def bound(self, denoise: Denoise, process: Gaussian, key: Array, batch: Batch) -> dict[str, Loss]:
        """-1/2 integral of SNR'(t) E |e - m|^2 dt + E[-log p(x_0 | z_least)] (VDM, arXiv 2107.00630, in continuous
        time; at t = 1 nothing of the text is left, so that the prior costs nothing). For its value: no gradient flows
        through m. Times are drawn with density ~ 1 / t: what is still missed at small ones is rare and counts much."""
        batch, (time_key, noise_key, last_key) = one_text(batch), jax.random.split(key, 3)
        u, scored = _evenly(process, time_key, batch), _scored(batch).astype(jnp.float32)
        t = process.least ** (1.0 - u)
        head = _read(denoise, process, noise_key, batch, t)
        missed = jnp.take(head.embeddings, batch.tokens, axis=0) - head.expected_embedding()
        cost = -math.log(process.least) * t * process.rate(t) * jnp.sum(missed * missed, axis=-1)
        last = _read(denoise, process, last_key, batch, jnp.full_like(t, process.least))
        return _loss(batch, head, jnp.sum(cost * scored) + last.cross_entropy(batch.tokens, scored))


def _evenly(process: Gaussian, key: Array, batch: Batch) -> Array:
    """float32 [B, 1] in (0, 1]."""
    if not isinstance(process, Gaussian):
        raise ValueError(f"EmbeddingFlow noises vectors, {type(process).__name__} tokens: set process=Gaussian()")
    return draw_times(key, (batch.tokens.shape[0], 1))


def _shown(key: Array, tokens: Array) -> Array:
    """bool [B, L]: of half of the rows a share of the text, which is drawn evenly; of the others nothing."""
    some_key, share_key, which_key = jax.random.split(key, 3)
    shape = (tokens.shape[0], 1)
    share = jax.random.uniform(share_key, shape) * jax.random.bernoulli(some_key, 0.5, shape)
    return jax.random.uniform(which_key, tokens.shape) < share


def _read(denoise: Denoise, process: Gaussian, key: Array, batch: Batch, t: Array) -> LogitsHead:
    mixed = process.mixed(key, ~batch.context_mask, t)
    where = {"positions": batch.positions, "segment_ids": batch.segment_ids}
    return denoise(batch.tokens, t, attention=Full(), embeddings=mixed, **where)


def _scored(batch: Batch) -> Array:
    return ~batch.context_mask & (batch.segment_ids > 0)


def _loss(batch: Batch, head: LogitsHead, total: Array) -> dict[str, Loss]:
    return {"canvas": loss_of(head, total, jnp.sum(batch.loss_mask, dtype=jnp.float32))}
