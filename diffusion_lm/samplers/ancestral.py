"""Ancestral sampling: the reverse process, in evenly spaced steps of time."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import likeliest
from diffusion_lm.processes.base import Process
from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, commit, fold_in_rows, gather_tokens
from diffusion_lm.samplers.sampling_params import SamplingParams

Array = jax.Array
_CORRECTOR_TIME = 0.25  # of a step's time: the noise that a corrector step adds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(CanvasSampler):
    """Each step is one posterior step t -> t - 1 / denoising_steps, from pure noise (MDLM, arXiv 2406.07524, equation
    6). A position is committed once no further step of the process changes it.

    corrector_steps  so many of the denoising steps, the last ones, are corrector steps (arXiv 2205.14987): each adds a
                     quarter of a step's noise to the finished text and removes it again, so that tokens which were
                     sampled independently are sampled anew given the rest. Little noise at the end helps more than the
                     same number of ordinary steps. Not for masks: see `remasking`
    begin, end       the times fall evenly from the one to the other, not from 1 to 0; the last step ends at 0 all the
                     same (Dream)
    cosine           the times are cos(pi/2 (1 - t)) of those: short steps at first (MD4, arXiv 2406.04329, appendix)
    noise_removal    the last of the steps is one of its own, from `end` to 0. It samples what is still noise, or takes
                     the likeliest tokens (SEDD and MDLM, as their public code has it)
    """

    process: Process
    denoising_steps: int
    eos: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    corrector_steps: int = 0
    begin: float = 1.0
    end: float = 0.0
    cosine: bool = False
    noise_removal: Literal["none", "sample", "likeliest"] = "none"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.end < self.begin <= 1:
            raise ValueError(f"times must fall and lie between 0 and 1; got {self.begin} to {self.end}")
        if not 0 <= self.corrector_steps < self.denoising_steps:
            raise ValueError(
                f"corrector_steps must be at least 0 and less than denoising_steps={self.denoising_steps}; "
                f"got {self.corrector_steps}"
            )
        if self._removes and (self.corrector_steps or self.denoising_steps < 2):
            raise ValueError(
                "noise_removal is a step of its own, without corrector_steps: denoising_steps is at least 2"
            )
        if self.corrector_steps and not hasattr(self.process, "forward"):
            raise ValueError(
                f"{type(self.process).__name__} can't add noise to finished text: use remasking, or corrector_steps=0"
            )

    def init(self, canvas: Canvas) -> Canvas:
        keys = fold_in_rows(canvas.keys, self.denoising_steps)
        noise = jax.vmap(lambda key: self.process.prior(key, canvas.tokens.shape[1:]))(keys)
        return canvas.replace(tokens=jnp.where(canvas.undecided, noise, canvas.tokens))

    def query(self, state: Canvas) -> Query:
        return Query(self._noised(state), self._times(state)[0])

    def update(self, state: Canvas, logits: Array) -> Canvas:
        (t, s), logits = self._times(state), self.sampling.allowed(logits)
        before = self._noised(state)
        keys = fold_in_rows(state.keys, state.step)
        tokens = self.process.reverse(keys, self.sampling.sharpened(logits), before, t, s)
        if self.noise_removal == "likeliest":
            tokens = jnp.where(state.step + 1 >= self.denoising_steps, likeliest(logits), tokens)
        confidence = jnp.exp(gather_tokens(jax.nn.log_softmax(logits, axis=-1), tokens))
        final = self.process.is_final(tokens, s)
        if self.corrector_steps:
            final &= state.step + 1 >= self.denoising_steps
        state = state.replace(tokens=jnp.where(state.undecided, tokens, before))
        return commit(state, final, tokens, confidence, eos=self.eos)

    def _times(self, state: Canvas) -> tuple[Array, Array]:
        """The times [B] that the next step goes between."""
        steps = self.denoising_steps - self.corrector_steps - self._removes
        t = self.begin - state.step * (self.begin - self.end) / steps
        s = jnp.maximum(t - (self.begin - self.end) / steps, 0.0)
        if self.cosine:
            t, s = (jnp.cos(0.5 * jnp.pi * (1 - time)) for time in (t, s))
        s = jnp.where(state.step + 1 >= steps + self._removes, 0.0, s)  # ends at 0, whatever the rounding
        t = jnp.where(state.step >= steps, _CORRECTOR_TIME / steps, t) if self.corrector_steps else t
        return tuple(jnp.full(state.tokens.shape[0], time) for time in (t, s))

    @property
    def _removes(self) -> int:
        """Steps that only remove noise."""
        return int(self.noise_removal != "none")

    def _noised(self, state: Canvas) -> Array:
        """The tokens, with a corrector step's noise."""
        if not self.corrector_steps:
            return state.tokens
        keys = fold_in_rows(state.keys, self.denoising_steps + 1 + state.step)
        t, s = self._times(state)
        correcting = state.undecided & (state.step >= self.denoising_steps - self.corrector_steps)
        return jnp.where(correcting, self.process.forward(keys, state.tokens, s, t), state.tokens)
