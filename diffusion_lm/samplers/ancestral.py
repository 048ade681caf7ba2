"""Ancestral sampling: the reverse process itself, in evenly spaced steps of time."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.processes.base import Process
from diffusion_lm.samplers.base import Canvas, commit, row_keys
from diffusion_lm.samplers.draw import Draw

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral:
    """Each pass is one posterior step t -> t - 1 / passes, from pure noise (MDLM, arXiv 2406.07524, equation 6).

    A position is committed once no further step of the process changes it.
    """

    process: Process
    passes: int
    eot: int
    draw: Draw = dataclasses.field(default_factory=Draw)

    def __post_init__(self):
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")

    def begin(self, canvas: Canvas) -> Canvas:
        noise = jax.vmap(lambda key: self.process.prior(key, canvas.tokens.shape[1:]))(
            row_keys(canvas.keys, self.passes)
        )
        return canvas.replace(tokens=jnp.where(canvas.open, noise, canvas.tokens))

    def step(self, denoise, state: Canvas) -> Canvas:
        t = 1.0 - state.passes / self.passes
        t, s = (jnp.full(state.tokens.shape[0], time) for time in (t, jnp.maximum(t - 1 / self.passes, 0.0)))
        s = jnp.where(state.passes + 1 >= self.passes, 0.0, s)  # the last step ends at 0, whatever the rounding
        logits = self.draw.allowed(denoise(state.tokens, t))
        tokens = self.process.reverse(
            row_keys(state.keys, state.passes), self.draw.sharpened(logits), state.tokens, t, s
        )
        state = state.replace(tokens=jnp.where(state.open, tokens, state.tokens))
        log_p = jax.nn.log_softmax(logits, axis=-1)
        drawn = jnp.minimum(tokens, logits.shape[-1] - 1)  # where a mask stays, nothing is committed
        probability = jnp.exp(jnp.take_along_axis(log_p, drawn[..., None], axis=-1)[..., 0])
        return commit(state, self.process.settled(tokens, s), tokens, probability, eot=self.eot)

    def done(self, state: Canvas) -> Array:
        return ~jnp.any(state.open, axis=1)
