"""Renoising: each pass keeps the tokens that it may draw together and lays fresh noise on all others."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import Process
from diffusion_lm.samplers.base import Canvas, commit, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import EntropyBound

Array = jax.Array


@struct.dataclass
class RenoisingState(Canvas):
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
    eos: int
    draw: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    pace: EntropyBound = dataclasses.field(default_factory=EntropyBound)
    max_temperature: float = 0.8
    min_temperature: float = 0.4
    entropy_threshold: float = 0.005

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")
        if isinstance(self.process, Absorbing):
            raise ValueError("renoising lays tokens as noise, and this network knows masks only: use entropy_bound")
        if not 0 < self.min_temperature <= self.max_temperature:
            raise ValueError(
                f"temperatures must fall and stay above 0, not go from {self.max_temperature} to {self.min_temperature}"
            )
        if dataclasses.replace(self.draw, suppressed=(), temperature=1.0) != SamplingParams():
            raise ValueError("renoising draws by its own temperatures: leave top_k, top_p and min_p out")
        if self.entropy_threshold < 0:
            raise ValueError(f"sure is an entropy, at least 0 nats, not {self.entropy_threshold}")

    def begin(self, canvas: Canvas) -> RenoisingState:
        fields = {field.name: getattr(canvas, field.name) for field in dataclasses.fields(Canvas)}
        tokens = jnp.where(canvas.undecided, self._noise(canvas, self.passes), canvas.tokens)
        return RenoisingState(**fields | {"tokens": tokens}, best=jnp.full_like(canvas.tokens, -1))

    def step(self, denoise, state: RenoisingState) -> RenoisingState:
        left = (self.passes - state.passes) / self.passes
        logits = self.draw.allowed(denoise(state.tokens, jnp.full(state.tokens.shape[0], left)))
        scaled = logits / (self.min_temperature + (self.max_temperature - self.min_temperature) * left)
        log_p = jax.nn.log_softmax(scaled, axis=-1)
        entropy = -jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn, confidence = SamplingParams()(fold_in_rows(state.keys, state.passes), scaled)
        keep = self._kept(state, entropy)
        tokens = jnp.where(state.undecided, jnp.where(keep, drawn, self._noise(state, state.passes)), state.tokens)
        going = state.replace(
            tokens=tokens, confidence=jnp.where(state.undecided, keep * confidence, state.confidence), best=best,
            passes=state.passes + 1,
        )  # fmt: skip
        closed = self._closed(state, entropy, best)
        certain = jnp.exp(jnp.max(jax.nn.log_softmax(logits, axis=-1), axis=-1))
        return commit(going.replace(passes=state.passes), closed[:, None], best, certain, eos=self.eos)

    def done(self, state: RenoisingState) -> Array:
        return ~jnp.any(state.undecided, axis=1)

    def _kept(self, state: RenoisingState, entropy: Array) -> Array:
        sure = jnp.where(state.undecided, -entropy, -jnp.inf)
        order = jnp.argsort(-sure, axis=1, stable=True)
        count = self.pace.count(jnp.take_along_axis(sure, order, axis=1), jnp.sum(state.undecided, axis=1), self.passes)
        return state.undecided & (jnp.argsort(order, axis=1) < jnp.maximum(count, 1)[:, None])

    def _closed(self, state: RenoisingState, entropy: Array, best: Array) -> Array:
        """bool [B]: rows whose canvas stands still and is sure, or that have no pass left."""
        stable = jnp.all((best == state.best) | ~state.undecided, axis=1)
        mean = jnp.sum(entropy * state.undecided, axis=1) / jnp.maximum(jnp.sum(state.undecided, axis=1), 1)
        return (stable & (mean < self.entropy_threshold)) | (state.passes + 1 >= self.passes)

    def _noise(self, state: Canvas, count: int | Array) -> Array:
        keys = fold_in_rows(fold_in_rows(state.keys, self.passes), count)
        return jax.vmap(lambda key: self.process.prior(key, state.tokens.shape[1:]))(keys)
