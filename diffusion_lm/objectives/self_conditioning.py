"""Self-conditioned training: half of the time the network reads twice, the second time told what it said the first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import AttentionPattern
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SelfConditionedObjective:
    """Calls `objective` (or any function called alike) with a network that reads twice (arXiv 2208.04202, section 3).

    With probability 1/2 a whole batch's noisy text is read without a soft prediction, and again with that reading's,
    through which no gradient goes; else once, without. A coin for the batch and not for each row, so that the other
    half costs no reading. Text that is read causally is clean, and is read once.

    A bound stays one: the prediction is a function of x_t and t, so that both readings are denoisers p(x_0 | x_t), and
    what is reported is the mean of their two bounds. A sampler that feeds back what an *earlier* pass said, of another
    x_t, saves the second reading of each pass and is no such denoiser: no bound here speaks of what it writes.
    """

    objective: Any

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch, **taught) -> dict[str, Loss]:
        """taught: what else the objective takes, as it is."""
        coin, key = jax.random.split(key)
        return self.objective(_ReadsTwice(denoise, jax.random.bernoulli(coin)), process, key, batch, **taught)


@dataclasses.dataclass(frozen=True)
class _ReadsTwice:
    """`types.Denoise`, which reads twice if `again`, bool []."""

    denoise: Denoise
    again: Array

    def __call__(self, tokens: Array, t: Array, *, attention: AttentionPattern, **where) -> Any:
        if not attention.may_be_noisy:
            return self.denoise(tokens, t, attention=attention, **where)

        def self_cond():
            heads = self.denoise(tokens, t, attention=attention, **where)
            return attention.pad((heads[0] if isinstance(heads, tuple) else heads).expected_embedding())

        shape = jax.eval_shape(self_cond)
        none = jnp.zeros(shape.shape, shape.dtype)
        return self.denoise(
            tokens, t, attention=attention, self_cond=jax.lax.cond(self.again, self_cond, lambda: none), **where
        )
