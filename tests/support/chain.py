"""A process on the world of `oracle`, whole: every canvas of 4 positions, each a piece or the mask, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.processes.interpolating import Interpolating
from diffusion_lm.processes.mixture import Mixture
from diffusion_lm.processes.score import AbsorbingScore, UniformScore
from diffusion_lm.processes.state_dependent import StateDependentMasking
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.types import DenseLogits
from support.oracle import LENGTH, TEXTS, VOCAB, truth

CANVASES = np.array(list(itertools.product(range(VOCAB + 1), repeat=LENGTH)), np.int32)  # [256, 4]


@functools.cache
def kernel(process, t: float) -> np.ndarray:
    """q(z | x_0) [3, 4] of one position, written down anew from each process's definition."""
    with jax.enable_x64(True):
        alpha = float(process.schedule.alpha(jnp.float64(t)))
    mask, uniform = np.eye(VOCAB + 1)[VOCAB], np.append(np.full(VOCAB, 1 / VOCAB), 0.0)
    masked, even = 1 - alpha, 0.0
    if isinstance(process, Uniform):
        masked, even = 0.0, 1 - alpha
    elif isinstance(process, Mixture):
        even = 2 * process.uniform / (1 - process.uniform) * np.sqrt(abs(alpha * (1 - alpha)))
    elif isinstance(process, Interpolating):
        with jax.enable_x64(True):
            alpha, masked, even, *_ = (float(part) for part in process.noise(jnp.float64(t)))
    elif isinstance(process, StateDependentMasking):
        alpha = 1 - (1 - alpha) ** np.array(process.powers)[:, None]
        return alpha * np.eye(VOCAB, VOCAB + 1) + (1 - alpha) * mask
    kept, masked, even = np.array([alpha, masked, even]) / (alpha + masked + even)
    return kept * np.eye(VOCAB, VOCAB + 1) + masked * mask + even * uniform


def noised(process, t: float) -> np.ndarray:
    """q(canvas | text), [81, 256]."""
    q = kernel(process, t)
    return np.prod(q[TEXTS[:, None], CANVASES[None]], axis=-1)


@functools.lru_cache(maxsize=256)
def true_denoiser(process, t: float) -> np.ndarray:
    """log p(x_i = v | the canvas), [256, 4, 3]: what the network's optimum is. Scores, and processes that only ask at
    masks, leave out what the position itself says."""
    by_all = isinstance(process, (Interpolating, StateDependentMasking)) and not isinstance(process, UniformScore)
    q = np.stack([kernel(process, t)[TEXTS[:, None, i], CANVASES[None, :, i]] for i in range(LENGTH)])  # [4, 81, 256]
    said = np.zeros((len(CANVASES), LENGTH, VOCAB))
    for i in range(LENGTH):
        seen = q if by_all else np.delete(q, i, axis=0)
        others = truth()[:, None] * np.prod(seen, axis=0)
        for v in range(VOCAB):
            said[:, i, v] = others[TEXTS[:, i] == v].sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        said = np.log(said / said.sum(axis=-1, keepdims=True))
    return np.where(np.isnan(said), -np.log(VOCAB), said)  # canvases that never come up


def logits_of_even(process) -> float:
    """Scores take e^l / V, without a softmax, for a probability."""
    return np.log(VOCAB) if isinstance(process, (AbsorbingScore, UniformScore)) else 0.0


@functools.cache
def _bumps() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(len(CANVASES), LENGTH, VOCAB))


def wrong_denoiser(process, t: float) -> np.ndarray:
    """Another one: noise on the true logits, different for every canvas."""
    said = true_denoiser(process, t) + 0.7 * _bumps()
    return said - np.log(np.exp(said).sum(axis=-1, keepdims=True))


def nodes(num_timesteps: int) -> tuple[np.ndarray, np.ndarray]:
    """All T times, or 64 nodes of Gauss-Legendre stretched towards both ends, and their shares."""
    if num_timesteps:
        return np.arange(1, num_timesteps + 1) / num_timesteps, np.full(num_timesteps, 1 / num_timesteps)
    node, weight = np.polynomial.legendre.leggauss(64)
    u = (node + 1) / 2
    return u**3 * (10 - 15 * u + 6 * u**2), weight / 2 * 30 * u**2 * (1 - u) ** 2


@functools.partial(jax.jit, static_argnums=(0, 3))
def costs(process, logits, t, num_timesteps):
    """What the noise of each time, text and canvas costs: logits [N, 256, 4, 3], t [N] -> [N, 81, 256]."""
    weights = jnp.ones((1, LENGTH), logits.dtype)

    def one(x0, xt, logits, t):
        said = DenseLogits(values=logits[None])
        return process.nelbo(said, x0[None], xt[None], t[None, None], weights, num_timesteps)

    every = jax.vmap(jax.vmap(one, (None, 0, 0, None)), (0, None, None, None))
    return jax.lax.map(lambda at: every(jnp.asarray(TEXTS), jnp.asarray(CANVASES), *at), (logits, t))


def bound(process, num_timesteps: int = 0, denoiser=true_denoiser, dtype=np.float64) -> float:
    """The process's bound, in nats a text: all texts, all canvases, all times."""
    times, shares = nodes(num_timesteps)
    said = np.stack([np.maximum(denoiser(process, t) + logits_of_even(process), -1e4) for t in times]).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        cost = np.asarray(costs(process, said, times.astype(dtype), num_timesteps))
    q = np.stack([noised(process, t) for t in times])
    return float(np.einsum("n,c,nck->", shares, truth(), np.where(q > 0, q * cost, 0.0)))


def written(process, num_timesteps: int, denoiser=true_denoiser) -> np.ndarray:
    """[81]: the law of what `process.posterior` writes in evenly spaced steps, from its prior."""
    law, times = noised(process, 1.0)[0], np.arange(num_timesteps, -1, -1) / num_timesteps
    logits = np.stack([denoiser(process, t) for t in times[:-1]]).astype(np.float32)
    for step in posteriors(process, logits, times):
        step = step / np.maximum(step.sum(axis=-1, keepdims=True), 1e-30)  # of some canvases there are none
        law = law @ np.einsum("xa,xb,xc,xd->xabcd", *np.moveaxis(step, 1, 0)).reshape(256, 256)
    return law.reshape((VOCAB + 1,) * LENGTH)[:VOCAB, :VOCAB, :VOCAB, :VOCAB].reshape(-1)


def posterior(process, logits, t: float, s: float) -> np.ndarray:
    """p(x_s | x_t) of every canvas and position, [256, 4, 4], up to a factor."""
    return posteriors(process, np.asarray(logits)[None], np.array([t, s]))[0]


def posteriors(process, logits, times) -> np.ndarray:
    """p(x_s | x_t) of every step, canvas and position, up to a factor: logits [N, 256, 4, 3], N + 1 times
    -> [N, 256, 4, 4]."""
    t, s = (jnp.asarray(np.tile(at[:, None], len(CANVASES)), jnp.float32) for at in (times[:-1], times[1:]))
    if hasattr(process, "posterior"):
        return np.asarray(_posteriors(process, logits, t, s), np.float64)
    reveal, masked = np.asarray(_reveal(process, t, s))[:, :1, None, None], (CANVASES == VOCAB)[..., None]
    pieces = np.where(masked, reveal * np.exp(logits.astype(np.float64)), np.eye(VOCAB + 1)[CANVASES][..., :VOCAB])
    return np.concatenate([pieces, np.where(masked, 1 - reveal, 0.0) + np.zeros_like(pieces[..., :1])], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _posteriors(process, logits, t, s):
    return jax.vmap(process.posterior, (0, None, 0, 0))(logits, jnp.asarray(CANVASES), t, s)


@functools.partial(jax.jit, static_argnums=0)
def _reveal(process, t, s):
    return process.reveal_probability(t, s)
