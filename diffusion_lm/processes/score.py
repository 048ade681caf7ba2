"""Score entropy (SEDD, arXiv 2310.16834): the network predicts the ratio s_y = p_t(x with y at i) / p_t(x).

The loss is the diffusion-weighted denoising score entropy (theorem 3.6), which bounds -log p(x_0) in continuous time.
At position i with token z it is the rate from y to z times K(s_y, r_y) = s_y - r_y log s_y + r_y log r_y - r_y, summed
over y != z, where r is the score given x_0.

Scores are unbounded at both ends of time, so the network predicts logits l of constant scale: e^l / V takes the place
of an x_0 prediction's probabilities, but its sum need not be 1. Where it isn't, the analytic step (SEDD, section 4) has
negative probabilities, and setting those to 0 reweighs the others arbitrarily. A step here uses softmax(l) in place of
e^l / V. Then the analytic step is a distribution, and equals the inherited `reverse`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import categorical
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import broadcast_times
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.types import LogitsHead, one_hot

Array = jax.Array
_LEAST = 1e-12  # of alpha, which is nothing at t = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsorbingScore(Absorbing):
    """A mask's scores are s_y = alpha / (1 - alpha) e^l_y / V (SEDD scales so too, appendix C)."""

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """-alpha' / (1 - alpha) (sum over y of e^l_y / V - log(e^l_x0 / V) - 1) at each mask; the masked bound if the
        sum is 1. Raises ValueError unless num_timesteps is 0."""
        _check_continuous(num_timesteps)
        weight = broadcast_times(self.rate_weight(t), x0.shape[1])
        weight = jnp.where(xt == self.mask, weight * weights, 0.0)
        return head.weighted_loss(_mask_nats, weight, x0, jnp.full(x0.shape, math.log(self.mask), weight.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnnormalizedScore(AbsorbingScore):
    """Steps with e^l / V as it is, as SEDD's code does; negative probabilities count as 0. The step to s = 0 takes
    softmax(l)."""

    def log_probabilities(self, logits: Array, t: Array, s: Array) -> Array:
        """float32 [B, L, V + 1], up to a constant: of each token, and of the mask that stays one, for a mask at t.

        logits [B, L, V] are the network's, t and s float32 [B]. With r = (alpha_s - alpha_t) / (1 - alpha_t) these are
        r e^l / V, and 1 - r sum(e^l) / V (SEDD, section 4; for log-linear noise Euler's step is the same).
        """
        share = self.reveal_probability(t, s)[:, None, None]
        tokens = logits - math.log(self.mask) + jnp.log(share)
        stays = jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(tokens), axis=-1, keepdims=True), 0.0))
        return jnp.concatenate([tokens, jnp.where(s[:, None, None] <= 0, -jnp.inf, stays)], axis=-1)

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        drawn = jax.vmap(categorical)(keys, self.log_probabilities(logits, t, s))
        drawn = jnp.where(drawn == logits.shape[-1], self.mask, drawn)
        return jnp.where(xt == self.mask, drawn, xt)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformScore(Uniform):
    """Scores s_y = (1 + a e^l_y) / (1 + a e^l_z) with a = alpha / (1 - alpha): with a sum of 1, those of `Uniform`."""

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """-alpha' / (alpha V) times the sum over y != z of K(s_y, r_y), r_y = (1 + V a [y = x0]) / (1 + V a [z = x0]).
        Raises ValueError unless num_timesteps is 0."""
        _check_continuous(num_timesteps)
        alpha = jnp.maximum(self.schedule.alpha(t), _LEAST)
        rate, lead = (
            -self.schedule.dalpha(t) / alpha / self.mask,
            jnp.log(alpha) - jnp.log(self.schedule.one_minus_alpha(t)),
        )
        rate, lead = (broadcast_times(a, x0.shape[1]) for a in (rate, lead))
        known = jnp.logaddexp(lead + math.log(self.mask), 0.0)  # log(1 + V a)
        return head.weighted_loss(_piece_nats, rate * weights, x0, xt, lead, known)

    def others(self, logits: Array, xt: Array, kappa: Array) -> Array:
        """Scores are conditioned on the other positions already."""
        del xt, kappa
        return jax.nn.softmax(logits, axis=-1)


def _check_continuous(num_timesteps: int) -> None:
    if num_timesteps:
        raise ValueError(
            f"score entropy is a bound in continuous time only: set objective.num_timesteps=0, not {num_timesteps}"
        )


def _mask_nats(logits, x0, log_vocab):
    right = jnp.sum(jnp.where(one_hot(logits, x0), logits, 0.0), axis=-1)
    return jnp.sum(jnp.exp(logits - log_vocab[..., None]), axis=-1) - (right - log_vocab) - 1.0


def _piece_nats(logits, x0, xt, lead, known):
    """Sum over y != z of r (e^d - 1 - d), d = log(s / r): exact where all ratios are near 1."""
    at_x0, at_z = one_hot(logits, x0), one_hot(logits, xt)
    log_s = jnp.logaddexp(logits + lead[..., None], 0.0)  # log(1 + a e^l)
    here = jnp.sum(jnp.where(at_z, log_s, 0.0), axis=-1)
    log_r = jnp.where(at_x0, known[..., None], 0.0) - jnp.where(xt == x0, known, 0.0)[..., None]
    others = ~at_z & (logits > -jnp.inf)
    d = jnp.where(others, log_s - here[..., None] - log_r, 0.0)
    return jnp.sum(jnp.exp(log_r) * (jnp.expm1(d) - d), axis=-1)
