"""The likelihood of held-out text: nats per token and bits per byte, with the Monte Carlo error of the noise."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from diffusion_lm.data.loader import TokenArray
from diffusion_lm.types import Batch, Loss

Array = jax.Array


class Estimate(NamedTuple):
    """The negative log likelihood of a text, or its upper bound.

    nats_per_token       mean over all text tokens and ends of text
    standard_error       of nats_per_token, from the sampled noise; 0 where nothing is random
    bits_per_byte        the same total per UTF-8 byte of the text
    bits_per_character   the same total per character
    """

    nats_per_token: float
    standard_error: float
    bits_per_byte: float
    bits_per_character: float


def held_out(
    losses: Callable[[Array, Batch], dict[str, Loss]],
    batches: Iterable[Batch],
    tokens: TokenArray,
    key: Array,
    *,
    draws: int = 2,
) -> dict[str, Estimate]:
    """Estimates each part of an objective on a text.

    The standard error comes from how the samples of one batch differ: it is that of the Monte Carlo estimate, and says
    nothing about the choice of text.

    Args:
        losses: (key, batch) -> parts by name, jitted.
        batches: all rows of the text.
        tokens: the text's counts of tokens, bytes and characters.
        key: a random key.
        draws: samples of the noise per batch, at least 2.

    Returns:
        An estimate for each part.

    Raises:
        ValueError: for fewer than 2 draws, or if the batches aren't the whole text.
    """
    if draws < 2:
        raise ValueError(f"a standard error needs at least 2 draws of noise per batch; got {draws}")
    sums, weight = {}, 0.0
    for i, batch in enumerate(batches):
        drawn = [losses(jax.random.fold_in(key, i * draws + r), batch) for r in range(draws)]
        for name in drawn[0]:
            sums.setdefault(name, []).append([part[name].sum for part in drawn])
        weight += float(next(iter(drawn[0].values())).weight)
    if weight != tokens.targets:
        raise ValueError(f"{weight:.0f} tokens were scored of {tokens.targets} in the text")
    return {name: _estimate(np.asarray(jax.device_get(s), np.float64), weight, tokens) for name, s in sums.items()}


def _estimate(sums: np.ndarray, weight: float, tokens: TokenArray) -> Estimate:
    """sums [batches, draws] of nats."""
    total = sums.mean(axis=1).sum()
    error = math.sqrt(sums.var(axis=1, ddof=1).sum() / sums.shape[1])
    return Estimate(
        nats_per_token=total / weight,
        standard_error=error / weight,
        bits_per_byte=total / tokens.bytes / math.log(2),
        bits_per_character=total / tokens.characters / math.log(2),
    )
