"""What a noise process is: how clean tokens become noise, and one exact step back."""

from typing import Protocol

import jax

from diffusion_lm.schedules import Schedule

Array = jax.Array


class Process(Protocol):
    """A frozen dataclass. t and s are float32 [B, n]; n spans of L / n positions share a time."""

    schedule: Schedule

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Pure noise, int32 of `shape`."""

    def corrupt(self, key: Array, x0: Array, t: Array) -> tuple[Array, Array]:
        """x_t ~ q(x_t | x_0), int32 [B, L], and where noise was put, bool [B, L]."""

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        """x_s ~ p(x_s | x_t), one posterior step t -> s < t, int32 [B, L]; keys [B], logits [B, L, V], t and s [B]."""


def spread(t: Array, length: int) -> Array:
    """[B, n] -> [B, length]: each span's time at each of its positions. Raises if n does not divide length."""
    if length % t.shape[1]:
        raise ValueError(f"{t.shape[1]} spans of time do not divide a row of {length} positions")
    return jax.numpy.repeat(t, length // t.shape[1], axis=1, total_repeat_length=length)
