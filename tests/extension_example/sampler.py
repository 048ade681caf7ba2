"""A canvas sampler: from left to right, several tokens a step."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, commit, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftToRight(CanvasSampler):
    """Commits the leftmost undecided tokens, so many a step; 0: as many as fill the canvas in `denoising_steps`."""

    denoising_steps: int
    eos: int
    a_step: int = 0
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    def query(self, state: Canvas) -> Query:
        rows, length = state.tokens.shape
        left = jnp.sum(state.undecided, axis=1) / length
        return Query(tokens=state.tokens, t=jnp.broadcast_to(left, (rows,)))

    def update(self, state: Canvas, logits: Array) -> Canvas:
        tokens, probability = self.sampling(fold_in_rows(state.keys, state.step), logits)
        a_step = self.a_step or -(-state.tokens.shape[1] // self.denoising_steps)
        rank = jnp.cumsum(state.undecided, axis=1)
        return commit(state, state.undecided & (rank <= a_step), tokens, probability, eos=self.eos)
