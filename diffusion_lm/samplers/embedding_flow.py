"""From Gaussian noise to text: the flow's ODE or the diffusion's posterior, and at its end a draw of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.samplers.base import Canvas, commit, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams

Array = jax.Array


@struct.dataclass
class EmbeddingCanvas(Canvas):
    """A canvas, all masks until the last pass, and z float32 [B, K, E], what is there instead."""

    z: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingFlowSampler:
    """Evenly spaced times from 1 to the process's `least`, or to 1 / passes where passes are few; the last pass draws
    every token from what is said there. With churn 1 and as many passes as it takes this is the model of which
    `objectives.embedding_flow` has the bound.

    churn  1 the diffusion's posterior, 0 the flow's ODE, by Euler steps; see `processes.gaussian`
    draw   of the last pass; what a pass before it moves towards is the mean vector of what is drawn from
    """

    process: Gaussian
    passes: int
    eos: int
    draw: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    churn: float = 1.0

    def __post_init__(self):
        if not isinstance(self.process, Gaussian):
            raise ValueError(f"{type(self.process).__name__} is no noise on vectors: use ancestral")
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")
        if not 0 <= self.churn <= 1:
            raise ValueError(f"churn is a share of the posterior's noise, in [0, 1]; got {self.churn}")

    def begin(self, canvas: Canvas) -> EmbeddingCanvas:
        fields = {field.name: getattr(canvas, field.name) for field in dataclasses.fields(Canvas)}
        keys, width = fold_in_rows(canvas.keys, self.passes), canvas.tokens.shape[1:]
        return EmbeddingCanvas(**fields, z=jax.vmap(lambda key: self.process.prior(key, width))(keys))

    def step(self, denoise, state: EmbeddingCanvas) -> EmbeddingCanvas:
        t, s = (jnp.full(state.tokens.shape[0], self._time(state.passes + later)) for later in (0, 1))
        logits = denoise(state.tokens, t, embeddings=self.process.as_embeddings(state.z, state.undecided, t[:, None]))
        mean = denoise.expected_embedding(self.draw.sharpened(logits))
        noise = fold_in_rows(fold_in_rows(state.keys, self.passes + 1), state.passes)
        tokens, confidence = self.draw(fold_in_rows(state.keys, state.passes), logits)
        last = jnp.broadcast_to(state.passes + 1 >= self.passes, state.undecided.shape)
        state = state.replace(z=self.process.reverse(noise, mean, state.z, t, s, self.churn))
        return commit(state, last, tokens, confidence, eos=self.eos)

    def done(self, state: EmbeddingCanvas) -> Array:
        return ~jnp.any(state.undecided, axis=1)

    def _time(self, count: Array) -> Array:
        """Of pass `count`, from 0 on; behind the last one there is none."""
        end = max(self.process.min_time, 1.0 / self.passes)
        return 1.0 - (1.0 - end) * jnp.minimum(count / max(self.passes - 1, 1), 1.0)
