"""Remasking: every pass may also take committed tokens back, so that more passes mean more second thoughts.

ReMDM (arXiv 2503.00307). A pass t -> s takes each standing token back with probability sigma, and reveals each mask
with what keeps the share of masks on its schedule; sigma = 0 is ancestral sampling.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import categorical
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Canvas, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.types import one_hot

Array = jax.Array


class RemaskingSchedule(Protocol):
    """How often a standing token is taken back: a frozen dataclass. t and s float32 [B], from 1 down to 0."""

    def times(self, t: Array, s: Array) -> tuple[Array, Array]:
        """The process's times that the pass t -> s goes between."""

    def sigma(self, t: Array, most: Array, standing: Array, confidence: Array) -> Array:
        """float32 [B, K] (or [B, 1]) at most `most` [B, 1]; standing bool [B, K] says where it takes back, probability
        float32 [B, K] what those tokens were committed with. Elsewhere it says how much more is revealed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Share:
    """Takes back by a share `eta` of the tokens, between the schedule's own times."""

    eta: float = 0.02

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is a share of the tokens, in [0, 1]; got {self.eta}")

    def times(self, t: Array, s: Array) -> tuple[Array, Array]:
        return t, s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap(_Share):
    """The same share `eta` every pass, as far as it may (section 4.1, equation 10)."""

    def sigma(self, t: Array, most: Array, standing: Array, confidence: Array) -> Array:
        return jnp.minimum(self.eta, most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescale(_Share):
    """The share `eta` of the most there may be (section 4.1)."""

    def sigma(self, t: Array, most: Array, standing: Array, confidence: Array) -> Array:
        return self.eta * most


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfidenceBased:
    """About one token a row and pass, rather one that was committed with little probability (section 4.1).

    What was drawn decides what is taken back, so this favours likely texts in however many passes.
    """

    def times(self, t: Array, s: Array) -> tuple[Array, Array]:
        return t, s

    def sigma(self, t: Array, most: Array, standing: Array, confidence: Array) -> Array:
        weight = jnp.where(standing, jnp.exp(-confidence), 0.0)
        return most * weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(_Share):
    """Ancestral until the time t_on, then with the share alpha_on standing takes back `eta` a pass until t_off, then
    ancestral to the end (section 4.2). Under another schedule than the linear one, it's the process's time that is
    held, at 1 - alpha_on. A pass belongs to the stage in which it begins."""

    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.t_off < self.t_on < 1 or not 0 < self.alpha_on < 1:
            raise ValueError(
                f"a loop needs 0 < t_off < t_on < 1 and 0 < alpha_on < 1, not t_off={self.t_off}, t_on={self.t_on}, "
                f"alpha_on={self.alpha_on}"
            )

    def times(self, t: Array, s: Array) -> tuple[Array, Array]:
        return self._at(t, t), self._at(s, t)

    def sigma(self, t: Array, most: Array, standing: Array, confidence: Array) -> Array:
        looping = (t > self.t_off) & (t <= self.t_on)
        return jnp.where(looping[:, None], jnp.minimum(self.eta, most), 0.0)

    def _at(self, time: Array, begun: Array) -> Array:
        held = 1.0 - self.alpha_on
        first = jnp.maximum(1.0 - (1.0 - time) * self.alpha_on / (1.0 - self.t_on), held)
        last = held * time / self.t_off
        return jnp.where(begun > self.t_on, first, jnp.where(begun > self.t_off, held, last))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remasking:
    """Evenly spaced steps of the remasking posterior (ReMDM, equations 5 to 7), from all masks.

    passes  all of them are made, and nothing is closed before the last, which leaves no mask
    eos     an end of text is taken back like any token. While it stands, what follows repeats it; when it goes, only
            its own position opens, so that an end moves a step at a time. -1: no token ends a text
    """

    process: Absorbing
    passes: int
    eos: int
    remask: RemaskingSchedule
    draw: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")
        if not isinstance(self.process, Absorbing):
            raise ValueError(f"remasking takes back to masks, {type(self.process).__name__} has none: use ancestral")

    def begin(self, canvas: Canvas) -> Canvas:
        return canvas

    def step(self, denoise, state: Canvas) -> Canvas:
        last = state.passes + 1 >= self.passes
        t = jnp.full(state.tokens.shape[0], 1.0 - state.passes / self.passes)
        at, to = self.remask.times(t, t - 1.0 / self.passes)
        to = jnp.where(last, 0.0, to)  # whatever the rounding
        logits = self.draw.allowed(denoise(state.tokens, at))
        sigma = self.sigma(state, t, at, to)
        weights = self.probabilities(self.draw.sharpened(logits), state.tokens, at, to, sigma)
        drawn = jax.vmap(categorical)(fold_in_rows(state.keys, state.passes), jnp.log(weights))
        tokens = jnp.where(state.undecided, jnp.where(drawn < logits.shape[-1], drawn, self.process.mask), state.tokens)
        written = self._written(tokens, state, logits)
        return self._closed_behind_ends(state.replace(tokens=tokens, confidence=written), last)

    def done(self, state: Canvas) -> Array:
        return ~jnp.any(state.undecided, axis=1)

    def probabilities(self, logits: Array, tokens: Array, t: Array, s: Array, sigma: Array) -> Array:
        """The law of a pass between the process's times t and s [B], each position by itself: float32 [B, K, V + 1],
        the mask in the last column; logits [B, K, V], tokens [B, K], sigma [B, K] as `sigma` gives it.

        A mask is revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), a token taken back with
        sigma (ReMDM, equation 6).
        """
        lost = self.process.schedule.one_minus_alpha
        now, then = (lost(time)[:, None] for time in (t, s))
        reveal = (now - then + sigma * (1.0 - now)) / now
        reveal = jnp.where(then <= 0, 1.0, jnp.clip(reveal, 0.0, 1.0))[..., None]
        sigma, masked = sigma[..., None], (tokens == self.process.mask)[..., None]
        pieces = jnp.where(masked, reveal * jax.nn.softmax(logits, axis=-1), (1.0 - sigma) * one_hot(logits, tokens))
        return jnp.concatenate([pieces, jnp.where(masked, 1.0 - reveal, sigma)], axis=-1)

    def sigma(self, state: Canvas, t: Array, at: Array, to: Array) -> Array:
        """float32 [B, K]: the chance that a token is taken back, at most min(1, (1 - alpha_s) / alpha_t) (ReMDM,
        equation 7), in the pass that begins at t and goes between the process's times `at` and `to`, all [B]."""
        free = state.undecided & ~_beyond(state, self.eos)
        standing = free & (state.tokens != self.process.mask)
        lost = self.process.schedule.one_minus_alpha
        most = jnp.minimum(1.0, lost(to) / jnp.maximum(1.0 - lost(at), 1e-12))[:, None]
        sigma = self.remask.sigma(t, most, standing, state.confidence)
        return jnp.where(free, sigma, 0.0)

    def _written(self, tokens: Array, state: Canvas, logits: Array) -> Array:
        """What each token was committed with: new ones by these logits, those that stayed as before."""
        new = jnp.take_along_axis(logits, jnp.minimum(tokens, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
        new = jnp.exp(new - jax.nn.logsumexp(logits, axis=-1))
        masked = tokens == self.process.mask
        return jnp.where(masked, 0.0, jnp.where(tokens == state.tokens, state.confidence, new))

    def _closed_behind_ends(self, state: Canvas, last: Array) -> Canvas:
        beyond = _beyond(state, self.eos)
        return state.replace(
            tokens=jnp.where(beyond, self.eos, state.tokens),
            confidence=jnp.where(beyond, 0.0, state.confidence),
            undecided=state.undecided & ~last,
            passes=state.passes + 1,
        )


def _beyond(state: Canvas, eos: int) -> Array:
    """bool [B, K]: behind an end of text that is not the prompt's, and not given."""
    ends = (state.tokens == eos) & ~state.fixed
    return ((jnp.cumsum(ends, axis=1) - ends) > 0) & ~state.fixed
