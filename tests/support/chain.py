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


@functools.partial(jax.jit, static_argnums=(0, 5))
def nelbos(process, logits, x0, xt, t, num_timesteps):
    """What each row's noise costs, [B]."""

    def one(logits, x0, xt, t):
        said, weights = DenseLogits(values=logits[None]), jnp.ones((1, LENGTH), logits.dtype)
        return process.nelbo(said, x0[None], xt[None], t[None, None], weights, num_timesteps)

    return jax.vmap(one)(logits, x0, xt, t)


def bound(process, num_timesteps: int = 0, denoiser=true_denoiser, dtype=np.float64) -> float:
    """The process's bound, in nats a text: all texts, all canvases, all times."""
    total = 0.0
    text, canvas = (a.reshape(-1) for a in np.mgrid[: len(TEXTS), : len(CANVASES)])
    for t, share in zip(*nodes(num_timesteps), strict=True):
        said = np.maximum(denoiser(process, t) + logits_of_even(process), -1e4)[canvas].astype(dtype)
        with jax.enable_x64(dtype == np.float64):
            cost = nelbos(process, said, TEXTS[text], CANVASES[canvas], np.full(len(text), t, dtype), num_timesteps)
        q = noised(process, t)[text, canvas]
        total += share * float(np.where(q > 0, truth()[text] * q * np.asarray(cost), 0.0).sum())
    return total


def written(process, num_timesteps: int, denoiser=true_denoiser) -> np.ndarray:
    """[81]: the law of what `process.posterior` writes in evenly spaced steps, from its prior."""
    law = noised(process, 1.0)[0]
    for i in range(num_timesteps, 0, -1):
        step = posterior(
            process,
            jnp.asarray(denoiser(process, i / num_timesteps), jnp.float32),
            i / num_timesteps,
            (i - 1) / num_timesteps,
        )
        step = step / np.maximum(step.sum(axis=-1, keepdims=True), 1e-30)  # of some canvases there are none
        law = law @ np.einsum("xa,xb,xc,xd->xabcd", *np.moveaxis(step, 1, 0)).reshape(256, 256)
    return law.reshape((VOCAB + 1,) * LENGTH)[:VOCAB, :VOCAB, :VOCAB, :VOCAB].reshape(-1)


@functools.partial(jax.jit, static_argnums=0)
def _compiled_posterior(process, logits, xt, t, s):
    return process.posterior(logits, xt, t, s)


def posterior(process, logits, t: float, s: float) -> np.ndarray:
    """p(x_s | x_t) of every canvas and position, [256, 4, 4], up to a factor."""
    xt, (t, s) = jnp.asarray(CANVASES), (jnp.full(len(CANVASES), at, jnp.float32) for at in (t, s))
    if hasattr(process, "posterior"):
        return np.asarray(_compiled_posterior(process, logits, xt, t, s), np.float64)
    reveal, masked = float(process.reveal_probability(t, s)[0]), (CANVASES == VOCAB)[..., None]
    pieces = np.where(masked, reveal * np.exp(np.asarray(logits, np.float64)), np.eye(VOCAB + 1)[CANVASES][..., :VOCAB])
    return np.concatenate([pieces, np.where(masked, 1 - reveal, 0.0)], axis=-1)
