"""First-hitting sampling: the reverse process of masks, simulated only at the times at which a token appears."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, commit, fields_of, fold_in_rows
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.schedules import Linear

Array = jax.Array


@struct.dataclass
class FirstHittingState(Canvas):
    """A canvas, and time float32 [B]: when its next token appears."""

    time: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstHitting(CanvasSampler):
    """Each step commits one position, drawn uniformly: what ancestral sampling tends to as its steps become infinitely
    short, in as many steps as there are masks (arXiv 2409.02908, section 4; BD3-LM, arXiv 2503.09573, section 5.2).

    With n masks left, the next token appears at t u^(1/n), u uniform: under the linear schedule each mask's own time is
    uniform on [0, t]. The network is given that time.

    denoising_steps  at least the width of a canvas
    """

    process: Absorbing
    denoising_steps: int
    eos: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.process, Absorbing) or not isinstance(self.process.schedule, Linear):
            raise ValueError("first hitting needs masks under the linear schedule: use ancestral")

    def init(self, canvas: Canvas) -> FirstHittingState:
        state = FirstHittingState(**fields_of(canvas), time=jnp.ones(canvas.tokens.shape[0]))
        return self._next(state)

    def query(self, state: FirstHittingState) -> Query:
        return Query(state.tokens, state.time)

    def update(self, state: FirstHittingState, logits: Array) -> FirstHittingState:
        tokens, confidence = self._draw(state, logits)
        rank = jnp.cumsum(state.undecided, axis=1) - 1
        chosen = state.undecided & (rank == self._rank(state)[:, None])
        return self._next(commit(state, chosen, tokens, confidence, eos=self.eos))

    def variants(self, length: int) -> tuple[CanvasSampler, ...]:
        """Raises ValueError where the steps are too few for a canvas of `length` masks."""
        if self.denoising_steps < length:
            raise ValueError(f"first hitting takes a step for each of {length} masks; got {self.denoising_steps} steps")
        return (self,)

    def _next(self, state: FirstHittingState) -> FirstHittingState:
        left = jnp.sum(state.undecided, axis=1)
        return state.replace(time=state.time * self._uniform(state) ** (1 / jnp.maximum(left, 1)))

    def _keys(self, state: Canvas) -> Array:
        """Three keys a row for the step, [B, 3]."""
        return jax.vmap(lambda key: jax.random.split(key, 3))(fold_in_rows(state.keys, state.step))

    def _draw(self, state: Canvas, logits: Array) -> tuple[Array, Array]:
        """Tokens [B, K], and the probability of each."""
        return self.sampling(self._keys(state)[:, 0], logits)

    def _rank(self, state: Canvas) -> Array:
        """int32 [B]: which of a row's masks, from left to right, the step commits."""
        left = jnp.sum(state.undecided, axis=1)
        return jax.vmap(lambda key, n: jax.random.randint(key, (), 0, jnp.maximum(n, 1)))(self._keys(state)[:, 1], left)

    def _uniform(self, state: Canvas) -> Array:
        """float32 [B]."""
        return jax.vmap(jax.random.uniform)(self._keys(state)[:, 2])
