"""What held-out text costs under an objective: nats a token, bits a byte, with the error of the noise drawn."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from diffusion_lm.data.loader import TokenArray
from diffusion_lm.types import Batch, Loss

Array = jax.Array


class Estimate(NamedTuple):
    """One reading of held-out text.

    nats_per_token       the likelihood's, or its bound's, mean over all text tokens and ends of text
    standard_error       of nats_per_token, from the noise drawn; 0 where nothing is random
    bits_per_byte        the same total over the text's UTF-8 bytes
    bits_per_character   and over its characters
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
    """Chain part of the objective over all of `batches`, with the noise drawn `draws` times anew for each.

    losses: (key, batch) -> parts, jitted. The standard error comes from how the draws of one batch differ, so it
    speaks of the Monte Carlo estimate alone and not of the text. Raises ValueError for fewer than two draws.
    """
    if draws < 2:
        raise ValueError(f"a standard error needs at least 2 draws of noise a batch, not {draws}")
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
