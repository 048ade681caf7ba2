"""What a noise process is: how clean tokens become noise, one exact step back, and the cost of undoing noise."""

import dataclasses
from typing import Any, Protocol

import jax

from diffusion_lm.schedules import Schedule
from diffusion_lm.types import LogitsHead

Array = jax.Array


class Process(Protocol):
    """A noise process on tokens. Implementations are frozen dataclasses that inherit from this class.

    t and s are times in [0, 1], 0 is clean. Where they are float32 [B, n], n spans of L / n positions share a time.

    Attributes:
        schedule: alpha(t), the part of x_0 that is left at t.
        mask: the mask's id; `sized` sets it.
    """

    schedule: Schedule
    mask: int

    def sized(self, *, mask: int, width: int) -> "Process":
        """The process for a tokenizer's mask id and a network's width; `diffusion_lm.build` calls it."""
        return dataclasses.replace(self, mask=mask)

    def init_params(self) -> Any:
        """What of the process is trained with the network, before training: a pytree, empty for none."""
        return {}

    def with_params(self, params: Any) -> "Process":
        """The process with trained parameters (None or empty for none)."""
        return self

    def as_static(self) -> "Process":
        """The process with plain numbers for arrays, so that it is hashable: samplers are static arguments."""
        return self

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        """x_1, pure noise, int32 of `shape`."""

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        """x_t ~ q(x_t | x_0), int32 [B, L]."""

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """The negative ELBO's integrand at noise x_t.

        Its mean over t (uniform on (0, 1], or on 1/T, 2/T, ..., 1) and over x_t bounds -log p(x_0) from above.

        Args:
            head: the network's predictions of x_0 from x_t.
            x0, xt: int32 [B, L].
            t: float32 [B, n].
            weights: float32 [B, L].
            num_timesteps: 0 for the rate in continuous time; T for T times the cost of the step t -> t - 1/T.

        Returns:
            float32 [], the sum over positions of weights * nats.
        """

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        """x_s ~ p(x_s | x_t), one posterior step t -> s < t.

        Args:
            keys: [B], a key per row.
            logits: float32 [B, L, V], the prediction of x_0.
            xt: int32 [B, L].
            t, s: float32 [B].

        Returns:
            int32 [B, L].
        """

    def is_final(self, xs: Array, s: Array) -> Array:
        """bool [B, L]: positions of x_s that no further step changes; s is [B]."""


def broadcast_times(t: Array, length: int) -> Array:
    """[B, n] -> [B, length]: each position's time. Raises ValueError if n doesn't divide length."""
    if length % t.shape[1]:
        raise ValueError(f"{t.shape[1]} spans of time do not divide a row of {length} positions")
    return jax.numpy.repeat(t, length // t.shape[1], axis=1, total_repeat_length=length)
