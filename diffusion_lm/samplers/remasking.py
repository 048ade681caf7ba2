"""Remasking: every step may also return committed tokens to masks, so that more steps correct more mistakes.

ReMDM (arXiv 2503.00307). A step t -> s remasks each committed token with probability sigma, and unmasks each mask with
the probability that keeps the masked share on its schedule; sigma = 0 is ancestral sampling.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import from_probabilities
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, after_eos, fold_in_rows, gather_tokens
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.types import one_hot

Array = jax.Array


class RemaskingSchedule(Protocol):
    """How often a committed token is remasked: a frozen dataclass. t and s float32 [B], from 1 down to 0."""

    def times(self, t: Array, s: Array) -> tuple[Array, Array]:
        """The process's times that the step t -> s goes between."""
        return t, s

    def sigma(self, t: Array, maximum: Array, committed: Array, confidence: Array) -> Array:
        """The probability of remasking, float32 [B, K] or [B, 1], at most `maximum` [B, 1].

        committed bool [B, K] says where it applies; confidence float32 [B, K] are those tokens' probabilities when they
        were committed. At masks sigma says how much more is unmasked.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescale(RemaskingSchedule):
    """The share `eta` of the highest probability allowed (section 4.1)."""

    eta: float = 0.02

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is a share of the tokens, in [0, 1]; got {self.eta}")

    def sigma(self, t: Array, maximum: Array, committed: Array, confidence: Array) -> Array:
        return self.eta * maximum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap(Rescale):
    """The same probability `eta` every step, up to the highest allowed (section 4.1, equation 10)."""

    def sigma(self, t: Array, maximum: Array, committed: Array, confidence: Array) -> Array:
        return jnp.minimum(self.eta, maximum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfidenceBased(RemaskingSchedule):
    """About one token a row and step, preferably one that was committed with a low probability (section 4.1).

    The sampled tokens decide what is remasked, so this favours likely texts however many the steps.
    """

    def sigma(self, t: Array, maximum: Array, committed: Array, confidence: Array) -> Array:
        weight = jnp.where(committed, jnp.exp(-confidence), 0.0)
        return maximum * weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Rescale):
    """Ancestral until time t_on; then, with a share alpha_on committed, remasks `eta` a step until t_off; then
    ancestral to the end (section 4.2). Under another than the linear schedule, the process's time is held at 1 -
    alpha_on. A step belongs to the phase in which it begins."""

    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.t_off < self.t_on < 1 or not 0 < self.alpha_on < 1:
            raise ValueError(
                f"a loop needs 0 < t_off < t_on < 1 and 0 < alpha_on < 1; got t_off={self.t_off}, t_on={self.t_on}, "
                f"alpha_on={self.alpha_on}"
            )

    def times(self, t: Array, s: Array) -> tuple[Array, Array]:
        return self._process_time(t, t), self._process_time(s, t)

    def sigma(self, t: Array, maximum: Array, committed: Array, confidence: Array) -> Array:
        looping = (t > self.t_off) & (t <= self.t_on)
        return jnp.where(looping[:, None], jnp.minimum(self.eta, maximum), 0.0)

    def _process_time(self, time: Array, begun: Array) -> Array:
        """The process's time at `time`, in the phase of a step that began at `begun`."""
        held = 1.0 - self.alpha_on
        first = jnp.maximum(1.0 - (1.0 - time) * self.alpha_on / (1.0 - self.t_on), held)
        last = held * time / self.t_off
        return jnp.where(begun > self.t_on, first, jnp.where(begun > self.t_off, held, last))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remasking(CanvasSampler):
    """Evenly spaced steps of the remasking posterior (ReMDM, equations 5 to 7), from all masks.

    denoising_steps  all of them are made; no position is closed before the last, which leaves no mask
    eos              an end of text is remasked like any token. While it stands, later positions repeat it; when it
                     goes, only its own position opens, so that an end moves one position a step. -1: no token ends a
                     text
    """

    process: Absorbing
    denoising_steps: int
    eos: int
    remask: RemaskingSchedule
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.process, Absorbing):
            raise ValueError(f"remasking needs masks, {type(self.process).__name__} has none: use ancestral")

    def query(self, state: Canvas) -> Query:
        return Query(state.tokens, self._times(state)[1])

    def update(self, state: Canvas, logits: Array) -> Canvas:
        (t, process_t, process_s), logits = self._times(state), self.sampling.allowed(logits)
        sigma = self.sigma(state, t, process_t, process_s)
        weights = self.probabilities(self.sampling.sharpened(logits), state.tokens, process_t, process_s, sigma)
        drawn = jax.vmap(from_probabilities)(fold_in_rows(state.keys, state.step), weights)
        drawn = jnp.where(drawn == logits.shape[-1], self.process.mask, drawn)
        tokens = jnp.where(state.undecided, drawn, state.tokens)
        confidence = self.confidence(state, tokens, logits)
        closed = after_eos(tokens, state.fixed, self.eos)
        return state.replace(
            tokens=jnp.where(closed, self.eos, tokens),
            confidence=jnp.where(closed, 0.0, confidence),
            undecided=state.undecided & (state.step + 1 < self.denoising_steps),
            step=state.step + 1,
        )

    def probabilities(self, logits: Array, tokens: Array, t: Array, s: Array, sigma: Array) -> Array:
        """The distribution of a step between the process's times t and s [B], each position by itself: float32
        [B, K, V + 1] with the mask in the last column, whatever its id; logits [B, K, V], tokens and sigma [B, K].

        A mask is unmasked with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), a token remasked with sigma
        (ReMDM, equation 6).
        """
        one_minus_alpha = self.process.schedule.one_minus_alpha
        now, then = (one_minus_alpha(time)[:, None] for time in (t, s))
        sigma = jnp.clip(sigma, 0.0, 1.0)  # rounding may leave [0, 1]
        unmask = (now - then + sigma * (1.0 - now)) / now
        unmask = jnp.where(then <= 0, 1.0, jnp.clip(unmask, 0.0, 1.0))[..., None]
        sigma, masked = sigma[..., None], (tokens == self.process.mask)[..., None]
        kept = jnp.where(masked, unmask * jax.nn.softmax(logits, axis=-1), (1.0 - sigma) * one_hot(logits, tokens))
        return jnp.concatenate([kept, jnp.where(masked, 1.0 - unmask, sigma)], axis=-1)

    def sigma(self, state: Canvas, t: Array, process_t: Array, process_s: Array) -> Array:
        """float32 [B, K]: the probability that a token is remasked, at most min(1, (1 - alpha_s) / alpha_t) (ReMDM,
        equation 7), in the step that begins at t and goes between the process's times [B]."""
        free = state.undecided & ~after_eos(state.tokens, state.fixed, self.eos)
        committed = free & (state.tokens != self.process.mask)
        one_minus_alpha = self.process.schedule.one_minus_alpha
        maximum = one_minus_alpha(process_s) / jnp.maximum(1.0 - one_minus_alpha(process_t), 1e-12)
        sigma = self.remask.sigma(t, jnp.minimum(1.0, maximum)[:, None], committed, state.confidence)
        return jnp.where(free, sigma, 0.0)

    def confidence(self, state: Canvas, tokens: Array, logits: Array) -> Array:
        """float32 [B, K]: the probability of each token when it was committed; 0 of masks."""
        new = jnp.exp(gather_tokens(logits, tokens) - jax.nn.logsumexp(logits, axis=-1))
        return jnp.where(tokens == self.process.mask, 0.0, jnp.where(tokens == state.tokens, state.confidence, new))

    def _times(self, state: Canvas) -> tuple[Array, Array, Array]:
        """float32 [B]: when the next step begins, and the process's times that it goes between."""
        t = jnp.full(state.tokens.shape[0], 1.0 - state.step / self.denoising_steps)
        process_t, process_s = self.remask.times(t, t - 1.0 / self.denoising_steps)
        # the last step ends at 0, whatever the rounding
        return t, process_t, jnp.where(state.step + 1 >= self.denoising_steps, 0.0, process_s)
