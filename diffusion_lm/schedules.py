"""Noise schedules: alpha(t), the share of x_0 that is left at time t, 1 - alpha(t), and the derivative of alpha.

Every schedule falls from alpha(0) = 1 to alpha(1) = 0. Times and results are float32 of any one shape.
Linear, cosine, polynomial: MD4 (arXiv 2406.04329, table 1). Geometric: SEDD (arXiv 2310.16834, section 5),
here stretched so that it meets both ends.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class Schedule(Protocol):
    """A frozen dataclass."""

    def alpha(self, t: Array) -> Array: ...

    def one_minus_alpha(self, t: Array) -> Array:
        """1 - alpha(t), exact also where it is small: bounds divide by it."""

    def dalpha(self, t: Array) -> Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """alpha = 1 - t."""

    def alpha(self, t: Array) -> Array:
        return 1.0 - t

    def one_minus_alpha(self, t: Array) -> Array:
        return t

    def dalpha(self, t: Array) -> Array:
        return -jnp.ones_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """alpha = 1 - cos(pi/2 (1 - t)): unmasks slowly at first, when there is little context."""

    def alpha(self, t: Array) -> Array:
        return 1.0 - self.one_minus_alpha(t)

    def one_minus_alpha(self, t: Array) -> Array:
        return jnp.sin(0.5 * math.pi * t)

    def dalpha(self, t: Array) -> Array:
        return -0.5 * math.pi * jnp.cos(0.5 * math.pi * t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial:
    """alpha = 1 - t^power.

    Args:
        power: above 0; 1 is `Linear`.
    """

    power: float = 2.0

    def __post_init__(self):
        if not self.power > 0:
            raise ValueError(f"a polynomial schedule needs power > 0, not {self.power}")

    def alpha(self, t: Array) -> Array:
        return 1.0 - self.one_minus_alpha(t)

    def one_minus_alpha(self, t: Array) -> Array:
        return t**self.power

    def dalpha(self, t: Array) -> Array:
        return -self.power * t ** (self.power - 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometric:
    """alpha = exp(-low^(1-t) high^t), stretched to run from 1 to 0; the total noise grows by a constant factor.

    Args:
        low: total noise at t = 0, above 0.
        high: total noise at t = 1, above `low`.
    """

    low: float = 1e-3
    high: float = 10.0

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise ValueError(f"a geometric schedule needs 0 < low < high, not low={self.low}, high={self.high}")

    def _total(self, t: Array) -> Array:
        return self.low * (self.high / self.low) ** t

    @property
    def _span(self) -> float:
        return math.exp(-self.low) - math.exp(-self.high)

    def alpha(self, t: Array) -> Array:
        return (jnp.exp(-self._total(t)) - math.exp(-self.high)) / self._span

    def one_minus_alpha(self, t: Array) -> Array:
        grown = self.low * jnp.expm1(t * math.log(self.high / self.low))
        return -math.exp(-self.low) * jnp.expm1(-grown) / self._span

    def dalpha(self, t: Array) -> Array:
        total = self._total(t)
        return -math.log(self.high / self.low) * total * jnp.exp(-total) / self._span
