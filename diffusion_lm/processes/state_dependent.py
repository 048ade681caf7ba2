"""Masked diffusion with a schedule for each token: tokens that are masked late are unmasked early."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.categorical import from_probabilities
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import broadcast_times
from diffusion_lm.types import LogitsHead, one_hot

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateDependentMasking(Absorbing):
    """MD4's state-dependent schedules (arXiv 2406.04329, section 6): fixed, or learned (`LearnedMasking`).

    Token v is masked at time t with probability (1 - alpha(t))^w_v (under a linear schedule MD4's t^w_v), so that its
    rate is w_v times the schedule's. That a position is masked is evidence about its token, so that the optimal x_0
    prediction differs from `Absorbing`'s.

    Args:
        powers: w, a positive number for each token id; all 1 is `Absorbing`. float32 [V] while they are trained.
    """

    powers: tuple[float, ...] | Array = ()

    def __post_init__(self):
        if self.mask >= 0 and len(self.powers) != self.mask:
            raise ValueError(f"process.powers has {len(self.powers)} numbers for {self.mask} tokens: give one for each")
        if isinstance(self.powers, tuple) and not all(0 < power < float("inf") for power in self.powers):
            raise ValueError("process.powers must be numbers above 0")

    def as_static(self) -> "StateDependentMasking":
        return dataclasses.replace(self, powers=tuple(np.asarray(self.powers, np.float64).tolist()))

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        masked = jnp.log(jax.random.uniform(key, x0.shape)) < self._log_masked(x0, t)
        return jnp.where(masked, self.mask, x0)

    def log_noise(self, x0: Array, xt: Array, t: Array) -> Array:
        """log q(x_t | x_0) of each position, float32 [B, L], where x_t is the mask or x_0."""
        masked = self._log_masked(x0, t)
        kept = jnp.where(masked < 0, jnp.log(-jnp.expm1(jnp.where(masked < 0, masked, -1.0))), -jnp.inf)
        return jnp.where(xt == self.mask, masked, kept)

    def _log_masked(self, x0: Array, t: Array) -> Array:
        """log q(x_t is the mask | x_0) of each position. Padding holds the mask already: any exponent will do."""
        powers = jnp.take(jnp.asarray(self.powers), x0, mode="clip")
        return powers * jnp.log(broadcast_times(self.schedule.one_minus_alpha(t), x0.shape[1]))

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """rate * (sum over y of w_y p_y - w_x0 - w_x0 log p_x0) at each mask (MD4's generalised bound); for T steps, T
        times the KL divergence of one step. The gradient reaches `powers`."""
        scored, shared = jnp.where(xt == self.mask, weights, 0.0), (jnp.asarray(self.powers),)
        if num_timesteps:
            left = broadcast_times(self.left(t, t - 1 / num_timesteps), x0.shape[1])
            return head.weighted_loss(_step_nats, num_timesteps * scored, x0, left, shared=shared)
        return head.weighted_loss(
            _rate_nats, broadcast_times(self.rate_weight(t), x0.shape[1]) * scored, x0, shared=shared
        )

    def left(self, t: Array, s: Array) -> Array:
        """(1 - alpha(s)) / (1 - alpha(t)): to the power w_v, the chance that a masked v at t is masked at s < t."""
        return jnp.where(s < 1e-6, 0.0, self.schedule.one_minus_alpha(s) / self.schedule.one_minus_alpha(t))

    def posterior(self, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        """p(x_s | x_t), float32 [B, L, V + 1]."""
        p = jax.nn.softmax(logits, axis=-1)
        revealed = p * (1.0 - self.left(t, s)[:, None, None] ** jnp.asarray(self.powers)[None, None])
        stays = 1.0 - jnp.sum(revealed, axis=-1, keepdims=True)
        p_s = jnp.concatenate([revealed, jnp.maximum(stays, 0.0) * (s > 0)[:, None, None]], axis=-1)
        return jnp.where((xt == self.mask)[..., None], p_s, one_hot(p_s, xt))

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        return jax.vmap(from_probabilities)(keys, self.posterior(logits, xt, t, s))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedMasking(StateDependentMasking):
    """The same with exponents that are trained with the network (objective `LearnedNoise`), starting from 1.

    A config holds it; `with_params` returns the trained process.
    """

    def __post_init__(self):
        if len(self.powers):
            raise ValueError(
                "process.powers are learned here: leave them out, or set process=StateDependentMasking(...)"
            )

    def init_params(self) -> dict[str, Array]:
        """log w, float32 [V]."""
        return {"log_powers": jnp.zeros(max(self.mask, 0))}

    def with_params(self, params: dict[str, Array]) -> StateDependentMasking:
        return StateDependentMasking(schedule=self.schedule, mask=self.mask, powers=jnp.exp(params["log_powers"]))


def _rate_nats(logits, x0, powers):
    log_p, powers = jax.nn.log_softmax(logits, axis=-1), _widened(powers, logits)
    right, own = _picked(log_p, x0), _picked(powers, x0)
    return jnp.sum(powers * jnp.exp(log_p), axis=-1) - own - own * right


def _step_nats(logits, x0, left, powers):
    """KL divergence between the steps given x_0 and given p: unmasked as x_0, or still masked."""
    log_p, powers = jax.nn.log_softmax(logits, axis=-1), _widened(powers, logits)
    right, own = _picked(log_p, x0), _picked(powers, x0)
    last = left <= 0.0
    left = jnp.where(last, 0.5, left)
    stays = left**own
    expected = jnp.sum(jnp.exp(log_p) * left[..., None] ** powers, axis=-1)
    return jnp.where(last, -right, -(1.0 - stays) * right + stays * (own * jnp.log(left) - jnp.log(expected)))


def _widened(powers: Array, logits: Array) -> Array:
    """The exponents, padded to the width of the logits; [1, 1, W]."""
    wide = jnp.pad(powers.astype(logits.dtype), (0, logits.shape[-1] - len(powers)), constant_values=1.0)
    return wide.reshape((1,) * (logits.ndim - 1) + (-1,))


def _picked(values: Array, tokens: Array) -> Array:
    return jnp.sum(jnp.where(one_hot(values, tokens), values, 0.0), axis=-1)
