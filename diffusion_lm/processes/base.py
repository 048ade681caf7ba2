"""What a noise process is: how clean tokens become noise, one exact step back, and what noise costs to undo."""

from typing import Protocol

import jax

from diffusion_lm.schedules import Schedule
from diffusion_lm.types import LogitsHead

Array = jax.Array


class Process(Protocol):
    """A frozen dataclass. t and s are float32 [B, n]; n spans of L / n positions share a time."""

    schedule: Schedule

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Pure noise, int32 of `shape`."""

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        """x_t ~ q(x_t | x_0), int32 [B, L]."""

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """The negative evidence lower bound's part at noise x_t: the sum over positions of weights [B, L] x nats.

        steps 0: the rate at t in continuous time. Else: what the step t -> t - 1 / steps costs, times steps. Its mean
        over t (uniform on (0, 1], or on 1 / steps, 2 / steps, .. 1) and over x_t bounds -log p(x_0) from above.
        """

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        """x_s ~ p(x_s | x_t), one posterior step t -> s < t, int32 [B, L]; keys [B], logits [B, L, V], t and s [B]."""

    def is_final(self, xs: Array, s: Array) -> Array:
        """bool [B, L]: positions of x_s that no further step changes; s [B]."""


def broadcast_times(t: Array, length: int) -> Array:
    """[B, n] -> [B, length]: each span's time at each of its positions. Raises if n does not divide length."""
    if length % t.shape[1]:
        raise ValueError(f"{t.shape[1]} spans of time do not divide a row of {length} positions")
    return jax.numpy.repeat(t, length // t.shape[1], axis=1, total_repeat_length=length)
