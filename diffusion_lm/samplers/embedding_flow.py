"""From Gaussian noise to text: the flow's ODE or the diffusion's posterior, and a draw of tokens at its end."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, commit, fields_of, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams

Array = jax.Array


@struct.dataclass
class EmbeddingCanvas(Canvas):
    """A canvas, all masks until the last step, and z float32 [B, K, E], the noisy embeddings."""

    z: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingFlowSampler(CanvasSampler):
    """Evenly spaced times from 1 to the process's last time, or to 1 / denoising_steps where steps are few; the last
    step samples every token from its prediction. With churn 1 and enough steps this is the model whose ELBO
    `objectives.embedding_flow` computes.

    churn     1: the diffusion's posterior; 0: Euler steps of the flow's ODE; see `processes.gaussian`
    sampling  of the last step; steps before it move towards the expected embedding of the same distribution
    """

    process: Gaussian
    denoising_steps: int
    eos: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    churn: float = 1.0
    uses_embeddings = True

    def __post_init__(self):
        if not isinstance(self.process, Gaussian):
            raise ValueError(f"{type(self.process).__name__} isn't noise on embeddings: use ancestral")
        super().__post_init__()
        if not 0 <= self.churn <= 1:
            raise ValueError(f"churn is a share of the posterior's noise, in [0, 1]; got {self.churn}")

    def init(self, canvas: Canvas) -> EmbeddingCanvas:
        keys, shape = fold_in_rows(canvas.keys, self.denoising_steps), canvas.tokens.shape[1:]
        return EmbeddingCanvas(**fields_of(canvas), z=jax.vmap(lambda key: self.process.prior(key, shape))(keys))

    def query(self, state: EmbeddingCanvas) -> Query:
        t = self._time(state, 0)
        return Query(state.tokens, t, embeddings=self.process.as_embeddings(state.z, state.undecided, t[:, None]))

    def update(self, state: EmbeddingCanvas, logits: Array, embed: Callable[[Array], Array]) -> EmbeddingCanvas:
        mean = embed(self.sampling.sharpened(logits))
        keys = fold_in_rows(fold_in_rows(state.keys, self.denoising_steps + 1), state.step)
        tokens, confidence = self.sampling(fold_in_rows(state.keys, state.step), logits)
        last = jnp.broadcast_to(state.step + 1 >= self.denoising_steps, state.undecided.shape)
        z = self.process.reverse(keys, mean, state.z, self._time(state, 0), self._time(state, 1), self.churn)
        return commit(state.replace(z=z), last, tokens, confidence, eos=self.eos)

    def _time(self, state: EmbeddingCanvas, later: int) -> Array:
        """float32 [B]: the time of the next step, or of one later; after the last step, its own."""
        end, count = max(self.process.min_time, 1.0 / self.denoising_steps), state.step + later
        time = 1.0 - (1.0 - end) * jnp.minimum(count / max(self.denoising_steps - 1, 1), 1.0)
        return jnp.full(state.tokens.shape[0], time)
