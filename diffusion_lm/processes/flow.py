"""Discrete flow matching: tokens jump to the data at a rate, from masks or from uniform noise, and a corrector.

Gat et al. (arXiv 2407.15595): the path is alpha(t) x_0 + (1 - alpha(t)) noise; their kappa is alpha here. Given x_0,
a token jumps to it at the rate lambda = -alpha' / (1 - alpha). The network's p = p(x_0 | x_t), conditioned on all
positions including the token itself, makes that lambda p_y for each token y.

The bound is the divergence between these two chains (arXiv 2412.03487). From masks it is the masked bound. From uniform
noise it lies above the entropy even for the true p: whether a token has jumped is known to the path but not to x_t, so
that a mixture of such paths is not a Markov chain of x_t. `Uniform` bounds the same noise without that gap.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import from_probabilities
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import broadcast_times
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.types import LogitsHead, cross_entropy, one_hot

Array = jax.Array


class Euler:
    """Euler steps of the rate to the data, and of a corrector: a further rate to the data that new noise undoes.

    A subclass is a process with the field `corrector`.
    """

    corrector: float

    def __post_init__(self):
        if not 0 <= self.corrector < float("inf"):
            raise ValueError(f"process.corrector={self.corrector} must be at least 0 (0: no corrector)")

    def source(self) -> Array:
        """The distribution of pure noise, float32 [V + 1]."""
        raise NotImplementedError

    def jump_probabilities(self, t: Array, s: Array) -> tuple[Array, Array]:
        """The probabilities that a step t -> s moves a token to the data, and to noise; each float32 of t's shape.

        To the data with (alpha_s - alpha_t) / (1 - alpha_t), the rate lambda in finite differences: from masks, this is
        the exact posterior. The corrector (arXiv 2407.15595, section 3) adds the noising rate -alpha' / alpha times
        c = corrector alpha (1 - alpha), and c lambda to undo it: finite everywhere, and no marginal changes. With few
        steps it is limited to the probability that is left; the last step, which ends at clean text, leaves none.
        """
        noisy = self.schedule.one_minus_alpha(t)
        gone = noisy - jnp.where(s < 1e-6, 0.0, self.schedule.one_minus_alpha(s))
        moved = gone / noisy
        corrected = jnp.minimum(self.corrector * gone, 1.0 - moved)
        return moved + corrected * (1.0 - noisy), corrected * noisy

    def posterior(self, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        """p(x_s | x_t), float32 [B, L, V + 1]."""
        data, noise = (a[:, None, None] for a in self.jump_probabilities(t, s))
        p = jnp.pad(jax.nn.softmax(logits, axis=-1), ((0, 0), (0, 0), (0, 1)))
        here = one_hot(p, xt)
        return data * self.targets(p, here) + noise * self.source()[None, None] + (1.0 - data - noise) * here

    def targets(self, p: Array, here: Array) -> Array:
        """Where a jump to the data goes, given the current tokens one-hot and the prediction p; [B, L, V + 1]."""
        del here
        return p

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        return jax.vmap(from_probabilities)(keys, self.posterior(logits, xt, t, s))

    def is_final(self, xs: Array, s: Array) -> Array:
        return jnp.broadcast_to(s[:, None] <= 0, xs.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskFlow(Euler, Absorbing):
    """From masks: `Absorbing`, with its bound, and a corrector.

    Args:
        corrector: its strength; over the whole path, a token is masked again corrector / 6 times on average.
    """

    corrector: float = 0.0

    def source(self) -> Array:
        return jax.nn.one_hot(self.mask, self.mask + 1)

    def targets(self, p: Array, here: Array) -> Array:
        return jnp.where(here[..., -1:], p, here)

    def is_final(self, xs: Array, s: Array) -> Array:
        return super().is_final(xs, s) | ((xs != self.mask) & (self.corrector == 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformFlow(Euler, Uniform):
    """From uniform noise.

    Args:
        corrector: its strength; over the whole path, a token is sampled again corrector / 2 times on average.
    """

    corrector: float = 0.0

    def source(self) -> Array:
        return jnp.full(self.mask + 1, 1.0 / self.mask).at[self.mask].set(0.0)

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """Continuous time: lambda (-log p(x_0) - p(z)) where z != x_0, lambda (1 - p(x_0)) where z = x_0. T steps: T
        times the KL divergence between one Euler step given x_0 and the network's."""
        if num_timesteps:
            moved, _ = dataclasses.replace(self, corrector=0.0).jump_probabilities(t, t - 1 / num_timesteps)
            return head.weighted_loss(_step_nats, num_timesteps * weights, x0, xt, broadcast_times(moved, x0.shape[1]))
        rate = -self.schedule.dalpha(t) / self.schedule.one_minus_alpha(t)
        return head.weighted_loss(_rate_nats, broadcast_times(rate, x0.shape[1]) * weights, x0, xt)


def _rate_nats(logits, x0, xt):
    away = _move_probability(logits, xt)
    return jnp.where(xt == x0, away, cross_entropy(logits, x0) - (1.0 - away))


def _step_nats(logits, x0, xt, moved):
    """Given x_0 a token moves there or stays; under the network it stays at z with probability 1 - moved (1 - p(z))."""
    cost, last = cross_entropy(logits, x0), moved >= 1.0
    moved = jnp.where(last, 0.5, moved)  # in the last step all tokens move, and only the cross-entropy counts
    stays = -jnp.log1p(-moved * _move_probability(logits, xt))
    wrong = moved * cost + (1.0 - moved) * (jnp.log1p(-moved) + stays)
    return jnp.where(last, cost, jnp.where(xt == x0, stays, wrong))


def _move_probability(logits, xt):
    """1 - p(z), exact also where p(z) is nearly 1."""
    return jnp.sum(jnp.where(one_hot(logits, xt), 0.0, jax.nn.softmax(logits, axis=-1)), axis=-1)
