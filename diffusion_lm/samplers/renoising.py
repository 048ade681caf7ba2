"""Renoising: each pass keeps the tokens that it may draw together and lays fresh noise on all others."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import Process
from diffusion_lm.samplers.base import Canvas, commit, row_keys
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.samplers.pace import EntropyBound

Array = jax.Array


@struct.dataclass
class Renoised(Canvas):
    """A canvas, all of it open until the row is done, and best int32 [B, K]: the last pass's likeliest tokens (-1
    before the first)."""

    best: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renoising:
    """For noise that is tokens: nothing is committed until the canvas stands still, so that every pass may change its
    mind (DiffusionGemma's sampler, as its public code has it).

    A pass draws every position at a temperature that falls evenly from `warm` to `cool`, keeps those of least entropy
    as far as `pace` bounds what is lost by drawing them together, one at least, and lays noise on the others. A row is
    done when its likeliest canvas is that of the pass before and has less than `sure` nats of entropy a position; that
    canvas is what it writes. So does the last pass. This seeks likely texts: it doesn't follow the network's
    distribution.
    """

    process: Process
    passes: int
    eot: int
    draw: Draw = dataclasses.field(default_factory=Draw)
    pace: EntropyBound = dataclasses.field(default_factory=EntropyBound)
    warm: float = 0.8
    cool: float = 0.4
    sure: float = 0.005

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")
        if isinstance(self.process, Absorbing):
            raise ValueError("renoising lays tokens as noise, and this network knows masks only: use entropy_bound")
        if not 0 < self.cool <= self.warm:
            raise ValueError(f"temperatures must fall and stay above 0, not go from {self.warm} to {self.cool}")
        if dataclasses.replace(self.draw, suppressed=(), temperature=1.0) != Draw():
            raise ValueError("renoising draws by its own temperatures: leave top_k, top_p and min_p out")
        if self.sure < 0:
            raise ValueError(f"sure is an entropy, at least 0 nats, not {self.sure}")

    def begin(self, canvas: Canvas) -> Renoised:
        fields = {field.name: getattr(canvas, field.name) for field in dataclasses.fields(Canvas)}
        tokens = jnp.where(canvas.open, self._noise(canvas, self.passes), canvas.tokens)
        return Renoised(**fields | {"tokens": tokens}, best=jnp.full_like(canvas.tokens, -1))

    def step(self, denoise, state: Renoised) -> Renoised:
        left = (self.passes - state.passes) / self.passes
        logits = self.draw.allowed(denoise(state.tokens, jnp.full(state.tokens.shape[0], left)))
        scaled = logits / (self.cool + (self.warm - self.cool) * left)
        log_p = jax.nn.log_softmax(scaled, axis=-1)
        entropy = -jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn, probability = Draw()(row_keys(state.keys, state.passes), scaled)
        keep = self._kept(state, entropy)
        tokens = jnp.where(state.open, jnp.where(keep, drawn, self._noise(state, state.passes)), state.tokens)
        going = state.replace(
            tokens=tokens, probability=jnp.where(state.open, keep * probability, state.probability), best=best,
            passes=state.passes + 1,
        )  # fmt: skip
        closed = self._closed(state, entropy, best)
        certain = jnp.exp(jnp.max(jax.nn.log_softmax(logits, axis=-1), axis=-1))
        return commit(going.replace(passes=state.passes), closed[:, None], best, certain, eot=self.eot)

    def done(self, state: Renoised) -> Array:
        return ~jnp.any(state.open, axis=1)

    def _kept(self, state: Renoised, entropy: Array) -> Array:
        sure = jnp.where(state.open, -entropy, -jnp.inf)
        order = jnp.argsort(-sure, axis=1, stable=True)
        count = self.pace.count(jnp.take_along_axis(sure, order, axis=1), jnp.sum(state.open, axis=1), self.passes)
        return state.open & (jnp.argsort(order, axis=1) < jnp.maximum(count, 1)[:, None])

    def _closed(self, state: Renoised, entropy: Array, best: Array) -> Array:
        """bool [B]: rows whose canvas stands still and is sure, or that have no pass left."""
        stable = jnp.all((best == state.best) | ~state.open, axis=1)
        mean = jnp.sum(entropy * state.open, axis=1) / jnp.maximum(jnp.sum(state.open, axis=1), 1)
        return (stable & (mean < self.sure)) | (state.passes + 1 >= self.passes)

    def _noise(self, state: Canvas, count: int | Array) -> Array:
        keys = row_keys(row_keys(state.keys, self.passes), count)
        return jax.vmap(lambda key: self.process.prior(key, state.tokens.shape[1:]))(keys)
