"""Ancestral sampling: the reverse process, in evenly spaced steps of time."""

import dataclasses

import jax
import jax.numpy as jnp

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
    end              the times fall evenly to this one, not to 0; the last step ends at 0 all the same (Dream)
    """

    process: Process
    denoising_steps: int
    eos: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    corrector_steps: int = 0
    end: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.end < 1:
            raise ValueError(f"the last of the times must be at least 0 and less than 1; got {self.end}")
        if not 0 <= self.corrector_steps < self.denoising_steps:
            raise ValueError(
                f"corrector_steps must be at least 0 and less than denoising_steps={self.denoising_steps}; "
                f"got {self.corrector_steps}"
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
        confidence = jnp.exp(gather_tokens(jax.nn.log_softmax(logits, axis=-1), tokens))
        final = self.process.is_final(tokens, s)
        if self.corrector_steps:
            final &= state.step + 1 >= self.denoising_steps
        state = state.replace(tokens=jnp.where(state.undecided, tokens, before))
        return commit(state, final, tokens, confidence, eos=self.eos)

    def _times(self, state: Canvas) -> tuple[Array, Array]:
        """The times [B] that the next step goes between."""
        steps = self.denoising_steps - self.corrector_steps
        t = 1.0 - state.step * (1 - self.end) / steps
        t, s = (jnp.full(state.tokens.shape[0], time) for time in (t, jnp.maximum(t - (1 - self.end) / steps, 0.0)))
        s = jnp.where(state.step + 1 >= steps, 0.0, s)  # the last step ends at 0, whatever the rounding
        return (jnp.where(state.step >= steps, _CORRECTOR_TIME / steps, t) if self.corrector_steps else t), s

    def _noised(self, state: Canvas) -> Array:
        """The tokens, with a corrector step's noise."""
        if not self.corrector_steps:
            return state.tokens
        keys = fold_in_rows(state.keys, self.denoising_steps + 1 + state.step)
        t, s = self._times(state)
        correcting = state.undecided & (state.step >= self.denoising_steps - self.corrector_steps)
        return jnp.where(correcting, self.process.forward(keys, state.tokens, s, t), state.tokens)
