"""The absorbing process with a schedule for each token: what is masked late is revealed early."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import categorical
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import spread
from diffusion_lm.types import Readout, one_hot

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenwise(Absorbing):
    """MD4's state-dependent schedules (arXiv 2406.04329) with fixed exponents; MD4 also learns them.

    Token v is masked at time t with probability lost(t)^w_v (under a linear schedule MD4's t^w_v), so that its rate is
    w_v times the schedule's. That a position is masked now says something about its token: a network's x_0 prediction
    has to learn that too, and so differs from `Absorbing`'s.

    powers  w, one above 0 for each piece of the tokenizer; all 1 is `Absorbing`
    """

    powers: tuple[float, ...] = ()

    def __post_init__(self):
        if not all(0 < power < float("inf") for power in self.powers):
            raise ValueError("process.powers must be numbers above 0")
        if self.mask >= 0 and len(self.powers) != self.mask:
            raise ValueError(f"process.powers has {len(self.powers)} numbers for {self.mask} pieces: give one for each")

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        # What is padded holds the mask already: any exponent will do.
        powers = jnp.take(jnp.asarray(self.powers), x0, mode="clip")
        masked = jax.random.uniform(key, x0.shape) < spread(self.schedule.lost(t), x0.shape[1]) ** powers
        return jnp.where(masked, self.mask, x0)

    def nelbo(self, readout: Readout, x0: Array, xt: Array, t: Array, weights: Array, steps: int) -> Array:
        """Each mask costs rate x (sum over y of w_y p_y - w_x0 - w_x0 log p_x0) (MD4's generalised bound); in T steps
        the Kullback-Leibler divergence of one step, times T."""
        scored = jnp.where(xt == self.mask, weights, 0.0)
        own = jnp.take(jnp.asarray(self.powers, scored.dtype), x0, mode="clip")
        if steps:
            left = spread(self.left(t, t - 1 / steps), x0.shape[1])
            return readout.total(self._step_nats, steps * scored, x0, own, left)
        return readout.total(self._rate_nats, spread(self.rate_weight(t), x0.shape[1]) * scored, x0, own)

    def left(self, t: Array, s: Array) -> Array:
        """lost(s) / lost(t): to the power w_v, the chance that a v that is masked at t still is at s < t."""
        return jnp.where(s < 1e-6, 0.0, self.schedule.lost(s) / self.schedule.lost(t))

    def posterior(self, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        """p(x_s | x_t), float32 [B, L, V + 1]."""
        p = jax.nn.softmax(logits, axis=-1)
        revealed = p * (1.0 - self.left(t, s)[:, None, None] ** jnp.asarray(self.powers)[None, None])
        stays = 1.0 - jnp.sum(revealed, axis=-1, keepdims=True)
        law = jnp.concatenate([revealed, jnp.maximum(stays, 0.0) * (s > 0)[:, None, None]], axis=-1)
        return jnp.where((xt == self.mask)[..., None], law, one_hot(law, xt))

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        return jax.vmap(categorical)(keys, jnp.log(self.posterior(logits, xt, t, s)))

    def _widened(self, logits: Array) -> Array:
        """The exponents, as many as a readout has logits; [1, 1, W]."""
        powers = jnp.asarray(self.powers, logits.dtype)
        return jnp.pad(powers, (0, logits.shape[-1] - len(self.powers)), constant_values=1.0)[None, None]

    def _rate_nats(self, logits, x0, own):
        log_p = jax.nn.log_softmax(logits, axis=-1)
        right = jnp.sum(jnp.where(one_hot(logits, x0), log_p, 0.0), axis=-1)
        return jnp.sum(self._widened(logits) * jnp.exp(log_p), axis=-1) - own - own * right

    def _step_nats(self, logits, x0, own, left):
        """Revealed as x_0 or still masked, knowing x_0 and not."""
        log_p = jax.nn.log_softmax(logits, axis=-1)
        right = jnp.sum(jnp.where(one_hot(logits, x0), log_p, 0.0), axis=-1)
        last = left <= 0.0
        left = jnp.where(last, 0.5, left)
        stays = left**own
        said = jnp.sum(jnp.exp(log_p) * left[..., None] ** self._widened(logits), axis=-1)
        return jnp.where(last, -right, -(1.0 - stays) * right + stays * (own * jnp.log(left) - jnp.log(said)))
