"""Renoising: each step keeps the tokens that can be sampled together and puts fresh noise at all other positions."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.categorical import likeliest
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import Process
from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, commit, fields_of, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import EntropyBound, entropy

Array = jax.Array


@struct.dataclass
class RenoisingState(Canvas):
    """A canvas, all of it undecided until the row is done.

    likeliest  int32 [B, K]  the previous step's most probable tokens; -1 before the first
    unchanged  int32 [B]     for how many steps they have been these
    """

    likeliest: Array
    unchanged: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renoising(CanvasSampler):
    """For noise that is tokens: no position is committed until the canvas is stable, so that every step may change it
    (DiffusionGemma's sampler, as its public code has it).

    A step samples every position at a temperature that falls linearly from `max_temperature` to `min_temperature`. It
    keeps the positions of lowest entropy, as many as `schedule` allows and at least one, and puts noise at the others.
    A row is done when its most probable canvas is that of the `stability` steps before and has less than
    `entropy_threshold` nats a position; that canvas is committed. So does the last step. This favours likely texts: it
    doesn't follow the network's distribution.

    sharpened_conditioning  a self-conditioned network receives the previous prediction at the step's temperature, as
                            DiffusionGemma does; else at temperature 1
    """

    process: Process
    denoising_steps: int
    eos: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    schedule: EntropyBound = dataclasses.field(default_factory=EntropyBound)
    max_temperature: float = 0.8
    min_temperature: float = 0.4
    entropy_threshold: float = 0.005
    stability: int = 1
    sharpened_conditioning: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.process, Absorbing):
            raise ValueError("renoising needs noise that is tokens, and this network has masks: use entropy_bound")
        if not 0 < self.min_temperature <= self.max_temperature:
            raise ValueError(
                f"temperatures must fall and stay above 0; got {self.max_temperature} to {self.min_temperature}"
            )
        if dataclasses.replace(self.sampling, suppressed=(), temperature=1.0) != SamplingParams():
            raise ValueError("renoising has temperatures of its own: leave top_k, top_p and min_p out")
        if self.entropy_threshold < 0:
            raise ValueError(f"entropy_threshold must be at least 0 nats; got {self.entropy_threshold}")
        if self.stability < 0:
            raise ValueError(f"stability must be at least 0 steps; got {self.stability}")

    def init(self, canvas: Canvas) -> RenoisingState:
        tokens = jnp.where(canvas.undecided, self._noise(canvas, self.denoising_steps), canvas.tokens)
        return RenoisingState(
            **fields_of(canvas) | {"tokens": tokens},
            likeliest=jnp.full_like(canvas.tokens, -1),
            unchanged=jnp.zeros(tokens.shape[0], jnp.int32),
        )

    def query(self, state: RenoisingState) -> Query:
        return Query(state.tokens, jnp.full(state.tokens.shape[0], self._time(state)))

    def update(self, state: RenoisingState, logits: Array) -> RenoisingState:
        logits = self.sampling.allowed(logits)
        scaled = logits / self._temperature(state)
        nats, best = entropy(scaled), likeliest(logits)
        drawn, confidence = self._draw(state, scaled)
        keep = self._kept(state, nats)
        tokens = jnp.where(keep, drawn, self._noise(state, state.step))
        same = jnp.all((best == state.likeliest) | ~state.undecided, axis=1)
        unchanged = jnp.where(same, state.unchanged + 1, 0)
        going = state.replace(
            tokens=jnp.where(state.undecided, tokens, state.tokens),
            confidence=jnp.where(state.undecided, keep * confidence, state.confidence),
            likeliest=best,
            unchanged=unchanged,
        )
        mean = jnp.sum(nats * state.undecided, axis=1) / jnp.maximum(jnp.sum(state.undecided, axis=1), 1)
        stable = unchanged >= self.stability
        final = (stable & (mean < self.entropy_threshold)) | (state.step + 1 >= self.denoising_steps)
        certainty = jnp.exp(jnp.max(jax.nn.log_softmax(logits, axis=-1), axis=-1))
        return commit(going, final[:, None], best, certainty, eos=self.eos)

    def conditioning(self, state: RenoisingState, logits: Array) -> Array:
        return logits / self._temperature(state) if self.sharpened_conditioning else logits

    def _temperature(self, state: Canvas) -> Array:
        return self.min_temperature + (self.max_temperature - self.min_temperature) * self._time(state)

    def _draw(self, state: Canvas, logits: Array) -> tuple[Array, Array]:
        """Tokens [B, K], and the probability of each."""
        return SamplingParams()(fold_in_rows(state.keys, state.step), logits)

    def _time(self, state: Canvas) -> Array:
        return (self.denoising_steps - state.step) / self.denoising_steps

    def _kept(self, state: RenoisingState, nats: Array) -> Array:
        scores = jnp.where(state.undecided, -nats, -jnp.inf)
        order, steps = jnp.argsort(-scores, axis=1, stable=True), self.denoising_steps
        count = self.schedule.count(jnp.take_along_axis(scores, order, axis=1), jnp.sum(state.undecided, axis=1), steps)
        return state.undecided & (jnp.argsort(order, axis=1) < jnp.maximum(count, 1)[:, None])

    def _noise(self, state: Canvas, count: int | Array) -> Array:
        keys = fold_in_rows(fold_in_rows(state.keys, self.denoising_steps), count)
        return jax.vmap(lambda key: self.process.prior(key, state.tokens.shape[1:]))(keys)
