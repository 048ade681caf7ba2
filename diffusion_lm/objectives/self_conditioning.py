"""Self-conditioned training (Chen et al., arXiv 2208.04202, section 3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import AttentionPattern
from diffusion_lm.objectives.base import Objective
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SelfConditionedObjective:
    """An objective whose network receives its own prediction as an extra input in half of the batches.

    With probability 1/2 noisy rows go through the network twice: first without a prediction, then with that of the
    first pass, through which no gradient flows. One coin is flipped per batch, so that the other batches cost one pass.
    Clean rows always go through once.

    The loss remains a bound: a prediction is a function of x_t and t, so both passes are denoisers p(x_0 | x_t), and
    the mean of their bounds is reported. A sampler that feeds back the prediction of an earlier step saves the first
    pass, but its denoiser depends on another x_t: no bound here holds for it.
    """

    objective: Objective

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch, **frozen) -> dict[str, Loss]:
        """See `Objective.__call__`."""
        coin, key = jax.random.split(key)
        return self.objective(_TwoPasses(denoise, jax.random.bernoulli(coin)), process, key, batch, **frozen)

    def elbo(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        """See `Objective.elbo`."""
        coin, key = jax.random.split(key)
        return self.objective.elbo(_TwoPasses(denoise, jax.random.bernoulli(coin)), process, key, batch)


@dataclasses.dataclass(frozen=True)
class _TwoPasses:
    """A `types.Denoise` that conditions noisy rows on a first pass where `again`, bool []."""

    denoise: Denoise
    again: Array

    def __call__(self, tokens: Array, t: Array, *, attention: AttentionPattern, **inputs) -> Any:
        if not attention.may_be_noisy:
            return self.denoise(tokens, t, attention=attention, **inputs)

        def first_pass():
            heads = self.denoise(tokens, t, attention=attention, **inputs)
            return attention.pad((heads[0] if isinstance(heads, tuple) else heads).expected_embedding())

        shape = jax.eval_shape(first_pass)
        nothing = jnp.zeros(shape.shape, shape.dtype)
        self_cond = jax.lax.cond(self.again, first_pass, lambda: nothing)
        return self.denoise(tokens, t, attention=attention, self_cond=self_cond, **inputs)
