"""Unmasking schedules: how many positions a step commits, given how certain the network is of each.

`Confidence` commits at least what a schedule's `least` says, by default one position a step and enough to finish within
its steps. `FixedCount` does just that; the others commit more where the network is certain enough.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
ConfidenceScore = Literal["probability", "margin", "entropy", "position"]


class LeastCount(Protocol):
    """A frozen dataclass: how many positions a step commits at least, and how a canvas is finished in time."""

    def __call__(self, num_undecided: Array, width: int, steps_left: int | Array, num_steps: int) -> Array:
        """int32 [B].

        Args:
          num_undecided: int32 [B].
          width: positions of the canvas, those fixed beforehand included.
          steps_left: of num_steps, this one included; [] or [B].
          num_steps: steps of a canvas.
        """


@dataclasses.dataclass(frozen=True)
class EvenlyLeft:
    """What is undecided, shared evenly by the steps left (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992)."""

    def __call__(self, num_undecided: Array, width: int, steps_left: int | Array, num_steps: int) -> Array:
        return -(-num_undecided // jnp.maximum(steps_left, 1))


@dataclasses.dataclass(frozen=True)
class EvenlyOverCanvas:
    """All of the canvas, shared evenly by its steps, so that a canvas with fixed positions is finished sooner (SDAR,
    arXiv 2510.06303; LLaDA2, arXiv 2512.15745). What doesn't divide evenly goes to the first steps."""

    def __call__(self, num_undecided: Array, width: int, steps_left: int | Array, num_steps: int) -> Array:
        count = width // num_steps + (num_steps - steps_left < width % num_steps)
        return jnp.minimum(count, num_undecided)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantCount:
    """`count` positions in every step, so that a canvas is finished after as many steps as that takes."""

    count: int = 1

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"a step commits at least 1 position; got {self.count}")

    def __call__(self, num_undecided: Array, width: int, steps_left: int | Array, num_steps: int) -> Array:
        return jnp.minimum(self.count, num_undecided)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverTime:
    """A share 1 - s / t of what is undecided, rounded down, for a step from time t to s of an even grid from 1 to
    `end`; the last step commits the rest (Dream, arXiv 2508.15487, as its public code has it). May be none."""

    end: float = 1e-3

    def __post_init__(self):
        if not 0 < self.end < 1:
            raise ValueError(f"the grid's end is a time between 0 and 1; got {self.end}")

    def __call__(self, num_undecided: Array, width: int, steps_left: int | Array, num_steps: int) -> Array:
        times = np.linspace(1.0, self.end, num_steps + 1, dtype=np.float32)
        shares = jnp.asarray(np.append(1 - times[1:-1] / times[:-2], np.float32(1)))
        return jnp.floor(num_undecided * shares[num_steps - jnp.maximum(steps_left, 1)]).astype(jnp.int32)


class UnmaskingSchedule(Protocol):
    """A frozen dataclass.

    score  what positions are ranked by: the sampled token's probability, the highest probability minus the second
           highest, minus the entropy in nats, or the position (from left to right)
    least  what a step commits at least
    """

    score: ConfidenceScore
    least: LeastCount = EvenlyLeft()

    def count(self, scores: Array, num_undecided: Array, steps_left: int | Array) -> Array:
        """int32 [B]: how many positions to commit.

        Args:
          scores: float32 [B, K] from the highest on; minus infinity where a position isn't undecided.
          num_undecided: int32 [B].
          steps_left: this step included; [] or [B].
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedCount(UnmaskingSchedule):
    """As many as `least` says, whatever the scores."""

    score: ConfidenceScore = "probability"
    least: LeastCount = EvenlyLeft()

    def count(self, scores: Array, num_undecided: Array, steps_left: int | Array) -> Array:
        del scores, steps_left
        return jnp.zeros_like(num_undecided)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(UnmaskingSchedule):
    """All whose probability is above `threshold` (Fast-dLLM, arXiv 2505.22618, section 3.3)."""

    threshold: float = 0.9
    least: LeastCount = EvenlyLeft()
    score = "probability"

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a probability, in [0, 1]; got {self.threshold}")

    def count(self, scores: Array, num_undecided: Array, steps_left: int | Array) -> Array:
        del num_undecided, steps_left
        return jnp.sum(scores > self.threshold, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor(UnmaskingSchedule):
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
class EntropyBound(UnmaskingSchedule):
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
