"""Unmasking schedules: how many positions a step commits, given how certain the network is of each.

`Confidence` commits at least one position a step, and enough to finish within its steps. `FixedCount` does just that;
the others commit more where the network is certain enough.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
ConfidenceScore = Literal["probability", "margin", "entropy"]


class UnmaskingSchedule(Protocol):
    """A frozen dataclass.

    score  what positions are ranked by: the sampled token's probability, the highest probability minus the second
           highest, or minus the entropy in nats
    """

    score: ConfidenceScore

    def count(self, scores: Array, num_undecided: Array, steps_left: int | Array) -> Array:
        """int32 [B]: how many positions to commit.

        Args:
          scores: float32 [B, K] from the highest on; minus infinity where a position isn't undecided.
          num_undecided: int32 [B].
          steps_left: this step included; [] or [B].
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedCount:
    """Evenly many a step (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992)."""

    score: ConfidenceScore = "probability"

    def count(self, scores: Array, num_undecided: Array, steps_left: int | Array) -> Array:
        del scores
        return -(-num_undecided // jnp.maximum(steps_left, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """All whose probability is above `threshold` (Fast-dLLM, arXiv 2505.22618, section 3.3)."""

    threshold: float = 0.9
    score = "probability"

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a probability, in [0, 1]; got {self.threshold}")

    def count(self, scores: Array, num_undecided: Array, steps_left: int | Array) -> Array:
        del num_undecided, steps_left
        return jnp.sum(scores > self.threshold, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """The most n with (n + 1) (1 - p_n) < factor, p_n the n-th highest probability: as many as can be right together
    (Fast-dLLM, arXiv 2505.22618, theorem 1 and section 3.3)."""

    factor: float = 1.0
    score = "probability"

    def __post_init__(self):
        if not self.factor > 0:
            raise ValueError(f"factor must be above 0; got {self.factor}")

    def count(self, scores: Array, num_undecided: Array, steps_left: int | Array) -> Array:
        del num_undecided, steps_left
        n = jnp.arange(1, scores.shape[1] + 1, dtype=jnp.int32)[None]
        return jnp.max(jnp.where((n + 1) * (1.0 - scores) < self.factor, n, 0), axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBound:
    """From the lowest entropy on, while the entropies before a position sum to at most `bound` nats. Their sum bounds
    the error of sampling these positions independently (EB-Sampler, arXiv 2505.24857, section 3)."""

    bound: float = 0.1
    score = "entropy"

    def __post_init__(self):
        if not self.bound >= 0:
            raise ValueError(f"an entropy bound must be at least 0 nats; got {self.bound}")

    def count(self, scores: Array, num_undecided: Array, steps_left: int | Array) -> Array:
        del num_undecided, steps_left
        undecided = ~jnp.isinf(scores)
        nats = jnp.where(undecided, -scores, 0.0)
        before = jnp.cumsum(nats, axis=1) - nats
        return jnp.sum(undecided & (before <= self.bound), axis=1)


def entropy(logits: Array) -> Array:
    """Entropy of softmax(logits [..., V]) in nats, [...]; logits of minus infinity add nothing."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)
