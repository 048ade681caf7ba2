"""Noise that is part masks, part uniform over the vocabulary: the formulas that `mixture` and `uniform` share.

q(x_t | x_0) keeps x_0 with probability alpha, masks it with `masked`, else samples any of V tokens. A prediction p
enters as q(x_t | p) = sum over v of p_v q(x_t | v), so that the optimal p is conditioned on the *other* positions: UDLM
(arXiv 2412.10193) and GIDD (2503.04482) require that of a network whose input includes the token itself. Here it
predicts p(x_0 | x_t) from *all* positions, and the likelihood q(z | v) of the position's own token z is divided out
(`others`): the same bound, and much faster to learn (docs/results).
With base = uniform / V and kappa = alpha / base, q(v | p) / base = 1 + kappa p_v, so that a bound needs only
S = sum over v of log(1 + kappa p_v).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import from_probabilities
from diffusion_lm.processes.base import Process, broadcast_times
from diffusion_lm.types import LogitsHead, one_hot

Array = jax.Array
_LEAST = 1e-12  # smaller shares of noise count as none


class Noise(NamedTuple):
    """The noise at a time, float32 of the time's shape: kept + masked + uniform = 1, and the rates at which the forward
    chain turns a token into a mask and into a uniform token."""

    kept: Array
    masked: Array
    uniform: Array
    mask_rate: Array
    uniform_rate: Array


class Interpolating(Process):
    """A process given by `noise(t)`; `mask` is the mask's id and the number of tokens."""

    mask: int

    def noise(self, t: Array) -> Noise:
        """The noise at t."""
        raise NotImplementedError

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array:
        return self._sample(key, self.noise(jnp.ones((1,) * len(shape))), jnp.zeros(shape, jnp.int32), kept=0.0)

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        noise = Noise(*(broadcast_times(part, x0.shape[1]) for part in self.noise(t)))
        return self._sample(key, noise, x0, kept=noise.kept)

    def _sample(self, key: Array, noise: Noise, x0: Array, kept) -> Array:
        which, piece = jax.random.split(key)
        u = jax.random.uniform(which, x0.shape)
        pieces = jax.random.randint(piece, x0.shape, 0, self.mask, jnp.int32)
        masked = noise.masked / jnp.maximum(noise.masked + noise.uniform, _LEAST) * (1.0 - kept)
        return jnp.where(u < kept, x0, jnp.where(u < kept + masked, self.mask, pieces))

    def reverse(self, keys: Array, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        return jax.vmap(from_probabilities)(keys, self.posterior(logits, xt, t, s))

    def forward(self, keys: Array, xs: Array, s: Array, t: Array) -> Array:
        """x_t ~ q(x_t | x_s) for s < t, int32 [B, L]; keys [B], s and t [B]."""
        _, _, stays, turned = self._between(t, s)
        return jax.vmap(lambda key, x, kept, noise: self._sample(key, noise, x, kept))(keys, xs, stays, turned)

    def posterior(self, logits: Array, xt: Array, t: Array, s: Array) -> Array:
        """p(x_s | x_t) up to a factor, float32 [B, L, V + 1]: by Bayes q(z | x_s) q(x_s | p), at each position by
        itself (GIDD, equation 9)."""
        now, then, stays, turned = jax.tree.map(lambda a: a[:, None, None], self._between(t, s))
        at_mask = (xt == self.mask)[..., None]
        arrives = jnp.where(at_mask, turned.masked, turned.uniform / self.mask)  # q(z | v) of any v but z
        p = self.others(logits, xt, now.kept[..., 0] / jnp.maximum(now.uniform[..., 0] / self.mask, _LEAST))
        pieces = (arrives + stays * one_hot(p, xt)) * (then.kept * p + then.uniform / self.mask)
        masks = (arrives + stays * at_mask) * then.masked
        return jnp.concatenate([pieces, masks], axis=-1)

    def others(self, logits: Array, xt: Array, kappa: Array) -> Array:
        """The prediction from the other positions, float32 [B, L, V]: softmax(logits) / q(z | v), normalised; q(z | z)
        is 1 + kappa times q(z | v) of any other v. kappa is float32 [B, 1]."""
        return _others(logits, xt, kappa)

    def _between(self, t: Array, s: Array):
        """The noise at t and at s < t, the probability that a token of x_s stays until t, and the noise in between."""
        now, then = self.noise(t), _clean_at_zero(self.noise(s), s)
        stays = now.kept / then.kept
        turned = then._replace(
            masked=jnp.maximum(now.masked - stays * then.masked, 0.0),
            uniform=jnp.maximum(now.uniform - stays * then.uniform, 0.0),
        )
        return now, then, stays, turned

    def is_final(self, xs: Array, s: Array) -> Array:
        return jnp.broadcast_to(s[:, None] <= 0, xs.shape)

    def nelbo(self, head: LogitsHead, x0: Array, xt: Array, t: Array, weights: Array, num_timesteps: int) -> Array:
        """Continuous time: GIDD's equation 12, of which UDLM's equation 18 is the uniform case. T steps: T times the KL
        divergence between the posteriors given x_0 and given p."""
        if num_timesteps:
            return self._nelbo_of_step(head, x0, xt, t, weights, num_timesteps)
        noise = self.noise(t)
        base = jnp.maximum(noise.uniform / self.mask, _LEAST)
        kappa = noise.kept / base
        kappa, base, mask_rate, piece_rate = (
            broadcast_times(a, x0.shape[1])
            for a in (
                kappa,
                base,
                noise.mask_rate / jnp.maximum(noise.masked, _LEAST),
                noise.uniform_rate / jnp.maximum(noise.uniform, _LEAST),
            )
        )
        at_mask = xt == self.mask
        rate = jnp.where(at_mask, mask_rate, piece_rate / (1.0 + kappa * (xt == x0)))
        return head.weighted_loss(_rate_nats, weights, x0, xt, kappa, base, rate, ~at_mask)

    def _nelbo_of_step(self, head: LogitsHead, x0, xt, t, weights, num_timesteps: int) -> Array:
        now, then, stays, turned = self._between(t, t - 1 / num_timesteps)
        length = x0.shape[1]
        then_base, now_base = (jnp.maximum(noise.uniform / self.mask, _LEAST) for noise in (then, now))
        then_kappa, now_kappa = then.kept / then_base, now.kept / now_base
        at_mask, right = xt == self.mask, xt == x0
        wide = Noise(*(broadcast_times(part, length) for part in turned))
        arrives = jnp.where(at_mask, wide.masked, wide.uniform / self.mask)
        then_kappa, then_base, now_kappa, now_base, stays, masked = (
            broadcast_times(a, length) for a in (then_kappa, then_base, now_kappa, now_base, stays, now.masked)
        )
        here = jnp.where(at_mask, masked, now_base * (1.0 + now_kappa * right))  # q(z | x_0)
        stayed = jnp.where(at_mask, 0.0, stays * then_base * (1.0 + then_kappa * right))
        here = jnp.maximum(here, _LEAST)
        arguments = (x0, xt, then_kappa, then_base, now_kappa, arrives / here, stayed / here, ~at_mask)
        return head.weighted_loss(_step_nats, num_timesteps * weights, *arguments)


def _clean_at_zero(noise: Noise, t: Array) -> Noise:
    """No noise at time 0, also where rounding made that a small number."""
    clean = t < 1e-6
    return noise._replace(
        kept=jnp.where(clean, 1.0, noise.kept),
        masked=jnp.where(clean, 0.0, noise.masked),
        uniform=jnp.where(clean, 0.0, noise.uniform),
    )


def _others(logits, xt, kappa):
    return jax.nn.softmax(logits - jnp.where(one_hot(logits, xt), jnp.log1p(kappa)[..., None], 0.0), axis=-1)


def _rate_nats(logits, x0, xt, kappa, base, rate, piece):
    """rate * (KL(q(. | x_0) | q(. | p)) + the Itakura-Saito divergence of q(z | .), which is 0 for masks)."""
    p = _others(logits, xt, kappa)
    log_ratio = _log_ratio(_picked(p, xt), kappa, xt == x0)
    itakura_saito = jnp.where(piece, jnp.expm1(log_ratio) - log_ratio, 0.0)
    return rate * (_divergence(p, _picked(p, x0), kappa, base) + itakura_saito)


def _step_nats(logits, x0, xt, then_kappa, then_base, now_kappa, arrives, stayed, piece):
    """KL(q(x_s | x_t, x_0) | q(x_s | x_t, p)): x_s came to z from anywhere (arrives), or was z and stayed."""
    p = _others(logits, xt, now_kappa)
    at_z, right = _picked(p, xt), xt == x0
    before = jnp.where(piece, _log_ratio(at_z, then_kappa, right), 0.0)
    after = jnp.where(piece, _log_ratio(at_z, now_kappa, right), 0.0)
    return arrives * _divergence(p, _picked(p, x0), then_kappa, then_base) + stayed * before - after


def _divergence(p, p_right, kappa, base):
    """KL(q(x_t | x_0) | q(x_t | p))."""
    spread_out = jnp.sum(jnp.log1p(kappa[..., None] * p), axis=-1)
    lead = jnp.log1p(kappa) - jnp.log1p(kappa * p_right)
    return base * (jnp.log1p(kappa) - spread_out) + kappa * base * lead


def _log_ratio(p_here, kappa, right):
    """log q(z | x_0) / q(z | p)."""
    return jnp.where(right, jnp.log1p(kappa), 0.0) - jnp.log1p(kappa * p_here)


def _picked(p, tokens):
    return jnp.sum(jnp.where(one_hot(p, tokens), p, 0.0), axis=-1)
