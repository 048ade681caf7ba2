"""Ancestral sampling: the reverse process itself, in evenly spaced steps of time."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.processes.base import Process
from diffusion_lm.samplers.base import Canvas, commit, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams

Array = jax.Array
_AGAIN = 0.25  # of a step's time: what a correcting pass lays on again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral:
    """Each pass is one posterior step t -> t - 1 / passes, from pure noise (MDLM, arXiv 2406.07524, equation 6).

    A position is committed once no further step of the process changes it.

    correct  so many of the passes, the last ones, correct: each lays a quarter of a step's noise on the finished text
             and takes it off again, so that what was drawn side by side is drawn anew with the rest known (a corrector
             as in arXiv 2205.14987, in discrete time). Little noise at the end mends more than the same passes spent
             on more steps; laying whole steps' noise again between them mends nothing. Not for masks: see `remasking`
    """

    process: Process
    passes: int
    eos: int
    draw: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    correct: int = 0

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")
        if not 0 <= self.correct < self.passes:
            raise ValueError(f"correct must be at least 0 and less than passes={self.passes}, not {self.correct}")
        if self.correct and not hasattr(self.process, "forward"):
            raise ValueError(f"{type(self.process).__name__} has no noise to lay on again: use remasking, or correct=0")

    def begin(self, canvas: Canvas) -> Canvas:
        noise = jax.vmap(lambda key: self.process.prior(key, canvas.tokens.shape[1:]))(
            fold_in_rows(canvas.keys, self.passes)
        )
        return canvas.replace(tokens=jnp.where(canvas.undecided, noise, canvas.tokens))

    def step(self, denoise, state: Canvas) -> Canvas:
        steps = self.passes - self.correct
        t = 1.0 - state.passes / steps
        t, s = (jnp.full(state.tokens.shape[0], time) for time in (t, jnp.maximum(t - 1 / steps, 0.0)))
        s = jnp.where(state.passes + 1 >= steps, 0.0, s)  # the last step ends at 0, whatever the rounding
        if self.correct:
            correcting = state.passes >= steps
            t = jnp.where(correcting, _AGAIN / steps, t)
            noised = self.process.forward(fold_in_rows(state.keys, self.passes + 1 + state.passes), state.tokens, s, t)
            state = state.replace(tokens=jnp.where(state.undecided & correcting, noised, state.tokens))
        logits = self.draw.allowed(denoise(state.tokens, t))
        tokens = self.process.reverse(
            fold_in_rows(state.keys, state.passes), self.draw.sharpened(logits), state.tokens, t, s
        )
        state = state.replace(tokens=jnp.where(state.undecided, tokens, state.tokens))
        log_p = jax.nn.log_softmax(logits, axis=-1)
        drawn = jnp.minimum(tokens, logits.shape[-1] - 1)  # where a mask stays, nothing is committed
        confidence = jnp.exp(jnp.take_along_axis(log_p, drawn[..., None], axis=-1)[..., 0])
        settled = self.process.is_final(tokens, s)
        if self.correct:
            settled &= state.passes + 1 >= self.passes
        return commit(state, settled, tokens, confidence, eos=self.eos)

    def done(self, state: Canvas) -> Array:
        return ~jnp.any(state.undecided, axis=1)
