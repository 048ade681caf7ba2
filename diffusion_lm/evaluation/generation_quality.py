"""Quality of generated text: its likelihood under an autoregressive judge, and how repetitive it is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.types import Alignment, Denoise, cross_entropy

Array = jax.Array


class Quality(NamedTuple):
    """Measures of a set of generated texts.

    nats_per_token  under the judge (the log of the generative perplexity); low for likely text, and for repetitions
    standard_error  of nats_per_token, over texts
    entropy         nats per token of the unigram distribution of all texts; low for few different tokens
    repeated        the share of 4-grams that occurred before in the same text
    """

    nats_per_token: float
    standard_error: float
    entropy: float
    repeated: float


def quality(nats: Array, rows: np.ndarray, given: int) -> Quality:
    """Measures generated rows.

    Args:
        nats: [N, L], the judge's -log p of each token (see `judged`).
        rows: int [N, L].
        given: how many tokens of each row are prompt.

    Raises:
        ValueError: for fewer than 2 rows, fewer than 4 generated tokens, or no prompt.
    """
    nats, rows = np.asarray(nats, np.float64), np.asarray(rows)
    if len(rows) < 2 or given < 1 or rows.shape[1] - given < 4:
        raise ValueError(f"rows of shape {rows.shape} with a prompt of {given}: measure at least 2 texts of 4 tokens")
    each, written = nats[:, given:].mean(axis=1), rows[:, given:]
    error = float(each.std(ddof=1) / np.sqrt(len(each)))
    return Quality(float(each.mean()), error, entropy(written), float(np.mean([repeated(row) for row in written])))


def judged(judge: Denoise, rows: Array) -> Array:
    """-log p of each token given those before it, float32 [N, L]; 0 for the first.

    Raises ValueError for a judge that doesn't predict the next token.
    """
    rows = jnp.asarray(rows, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32)[None], rows.shape)
    t = jnp.zeros((rows.shape[0], 1))
    head = judge(rows, t, attention=Causal(), positions=positions, segment_ids=jnp.ones_like(rows))
    if head.alignment is not Alignment.NEXT:
        raise ValueError(f"a judge must predict the next token, its logits are aligned to {head.alignment}")
    return jnp.pad(cross_entropy(head.logits()[:, :-1], rows[:, 1:]), ((0, 0), (1, 0)))


def entropy(tokens: np.ndarray) -> float:
    """The entropy of the unigram distribution of int tokens [...], in nats."""
    share = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(share * np.log(share)).sum() + 0.0)


def repeated(row: np.ndarray, size: int = 4) -> float:
    """The share of a text's n-grams that occurred before in it: int [L] -> 0 (all different) .. nearly 1."""
    grams = np.lib.stride_tricks.sliding_window_view(row, size)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
