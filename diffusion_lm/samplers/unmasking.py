"""The dial: how many positions a pass commits, given how sure the network is of each.

A pace never says none: `Confidence` commits at least one position a pass, and enough that a canvas is written within
its passes. Beyond that, evenly many a pass fixes the cost; the others let the text decide.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
ConfidenceScore = Literal["probability", "margin", "entropy"]


class UnmaskingSchedule(Protocol):
    """A frozen dataclass.

    measure  what `sure` is: the drawn token's probability, the likeliest token's probability less the second's, or
             minus the entropy in nats
    """

    measure: ConfidenceScore

    def count(self, sure: Array, num_undecided: Array, left: int | Array) -> Array:
        """int32 [B]: how many to commit, of sure float32 [B, K] from the surest on (minus infinity where nothing is
        open), num_undecided int32 [B] of them open, with `left` passes to go, this one included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedCount:
    """Evenly many a pass (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992): the number of passes is the dial."""

    measure: ConfidenceScore = "probability"

    def count(self, sure: Array, num_undecided: Array, left: int | Array) -> Array:
        del sure
        return -(-num_undecided // jnp.maximum(left, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """All whose probability is above `least` (Fast-dLLM, arXiv 2505.22618, section 3.3)."""

    least: float = 0.9
    measure = "probability"

    def __post_init__(self):
        if not 0 <= self.least <= 1:
            raise ValueError(f"threshold is a probability, in [0, 1]; got {self.least}")

    def count(self, sure: Array, num_undecided: Array, left: int | Array) -> Array:
        del num_undecided, left
        return jnp.sum(sure > self.least, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """The most n with (n + 1) (1 - p_n) < factor, p_n the n-th highest probability: as many as can be right together
    (Fast-dLLM, arXiv 2505.22618, theorem 1 and section 3.3)."""

    factor: float = 1.0
    measure = "probability"

    def __post_init__(self):
        if not self.factor > 0:
            raise ValueError(f"factor must be above 0, not {self.factor}")

    def count(self, sure: Array, num_undecided: Array, left: int | Array) -> Array:
        del num_undecided, left
        n = jnp.arange(1, sure.shape[1] + 1, dtype=jnp.int32)[None]
        return jnp.max(jnp.where((n + 1) * (1.0 - sure) < self.factor, n, 0), axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBound:
    """From the least entropy on, while the entropies before a position sum to at most `bound` nats: their sum bounds
    what is lost by drawing them independently (EB-Sampler, arXiv 2505.24857, section 3)."""

    bound: float = 0.1
    measure = "entropy"

    def __post_init__(self):
        if not self.bound >= 0:
            raise ValueError(f"an entropy bound must be at least 0 nats, not {self.bound}")

    def count(self, sure: Array, num_undecided: Array, left: int | Array) -> Array:
        del num_undecided, left
        is_open = ~jnp.isinf(sure)
        entropy = jnp.where(is_open, -sure, 0.0)
        before = jnp.cumsum(entropy, axis=1) - entropy
        return jnp.sum(is_open & (before <= self.bound), axis=1)
