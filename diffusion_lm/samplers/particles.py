"""A population of texts: canvases are proposals, the causal reading weighs them, and the better ones go on.

Sequential Monte Carlo with the network's own autoregressive distribution as its target. A canvas that is cleared in a
few passes draws neighbours side by side, as if they knew nothing of each other; the weights mend just that.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers import block_diffusion
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.base import CachedDenoiser, Canvas, Generation, Prompt, Stage, TextSampler, fold_in_rows
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.sampling_params import SamplingParams

Array = jax.Array
_RESAMPLING = 2**31 - 2  # a count of canvases that no row draws with


@struct.dataclass
class ParticleState(block_diffusion.BlockState):
    """The carry of `BlockDiffusion`, and log_weight float32 [B]: how much likelier than its proposal each row's text is."""

    log_weight: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticleSampler(TextSampler):
    """Rows in groups of `particles`, each behind one prompt. After a canvas a row's weight grows by p(canvas | text),
    read causally, over what the canvas was drawn with; a group whose effective size falls to half is drawn anew from
    itself by weight (systematic resampling; Doucet and Johansen 2009, sections 3.4 and 3.5). At the end every group
    is: its rows are then draws of the network's autoregressive distribution, exactly so as `particles` grows.

    The weights are exact because masks are revealed in an order that doesn't look at tokens: proposals must be
    `Ancestral` on masks, drawn as the network says (ValueError otherwise). A pass reads each canvas causally, in place
    of the one that reads it into the cache.
    """

    canvases: BlockDiffusion
    particles: int
    separable = False

    def __post_init__(self):
        sampler, plain = self.canvases.sampler, self.canvases.align == 1 and not self.canvases.record
        if not (plain and isinstance(sampler, Ancestral) and isinstance(sampler.process, Absorbing)):
            raise ValueError("particles are weighed after ancestral canvases of masks over a causal cache, unrecorded")
        if dataclasses.replace(sampler.draw, suppressed=()) != SamplingParams():
            raise ValueError("particles must be drawn as the network says: temperature 1, and no top_k, top_p or min_p")
        if self.particles < 2:
            raise ValueError(f"a population has at least 2 particles, not {self.particles}")

    @property
    def canvas(self) -> int:
        return self.canvases.canvas

    def width(self, length: int) -> int:
        return self.canvas

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have."""
        return self.canvases.slots(prompt, length)

    def begin(self, model: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> ParticleState:
        """Rows i * particles to (i + 1) * particles - 1 are a group: give them one prompt."""
        rows = len(prompt.length)
        if rows % self.particles:
            raise ValueError(f"{rows} rows can't be cut into populations of {self.particles}")
        state = self.canvases.begin(model, cache, prompt, keys, length=length)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return ParticleState(**fields, log_weight=jnp.zeros(rows))

    def phases(self, length: int) -> tuple[Stage, ...]:
        inner = [dataclasses.replace(self, canvases=phase.sampler) for phase in self.canvases.phases(length)]
        steps = [phase.steps for phase in self.canvases.phases(length)]
        return tuple(Stage(sampler=one, steps=n) for one, n in zip(inner, steps, strict=True))

    def done(self, state: ParticleState) -> Array:
        return self.canvases.done(state)

    def step(self, model: CachedDenoiser, state: ParticleState) -> ParticleState:
        """A canvas in every row, its weight, and a new generation where few rows carry all of it."""
        canvas, _ = self.canvases.cleared(model, state)
        going, last = ~state.finished, jnp.take_along_axis(state.text, state.filled[:, None] - 1, axis=1)
        read = jnp.where(going[:, None], jnp.concatenate([last, canvas.tokens], axis=1), 0)
        before = model.truncate(state.cache, going.astype(jnp.int32))
        head, cache = model.extend(before, read, jnp.where(going, read.shape[1], 0), Causal())
        gained = self._gained(canvas, head.logits()[:, :-1])
        state = self.canvases.written(state, canvas).replace(
            cache=cache, nfe=state.nfe + canvas.passes + 1, log_weight=state.log_weight + jnp.where(going, gained, 0.0)
        )
        last = jnp.all(state.finished)  # where every group is drawn, so that its rows count alike
        return self._resampled(model, state, jnp.where(last, self.particles + 1, self.particles / 2))

    def answer(self, state: ParticleState, *, length: int) -> Generation:
        return self.canvases.answer(state, length=length)

    def _gained(self, canvas: Canvas, logits: Array) -> Array:
        """float32 [B]: log p - log q of what was written, up to an end of text."""
        log_p = jax.nn.log_softmax(self.canvases.sampler.draw.allowed(logits), axis=-1)
        log_p = jnp.take_along_axis(log_p, canvas.tokens[..., None], axis=-1)[..., 0]
        ends = canvas.tokens == self.canvases.sampler.eos
        counted = ((jnp.cumsum(ends, axis=1) - ends) == 0) & ~canvas.fixed
        log_q = jnp.log(jnp.where(counted, canvas.confidence, 1.0))
        return jnp.sum(jnp.where(counted, log_p - log_q, 0.0), axis=1)

    def _resampled(self, model: CachedDenoiser, state: ParticleState, least: Array) -> ParticleState:
        rows, log_weight = self._drawn(state, least)
        return state.replace(
            text=jnp.take(state.text, rows, axis=0),
            filled=jnp.take(state.filled, rows),
            finished=jnp.take(state.finished, rows),
            cache=model.resize(state.cache, rows),
            log_weight=log_weight,
        )

    def _drawn(self, state: ParticleState, least: Array) -> tuple[Array, Array]:
        """Which row each row goes on from, int32 [B], and its log weight: groups of effective size up to `least` are
        drawn by weight, evenly spread (one uniform number a group), and then weigh alike."""
        size = self.particles
        log_weight = state.log_weight.reshape(-1, size)
        share = jax.nn.softmax(log_weight, axis=1)
        anew = (1.0 / jnp.sum(share**2, axis=1) <= least)[:, None]
        start, turn = self._uniform(state, 0), self._uniform(state, 1)
        at = (jnp.arange(size, dtype=jnp.float32)[None] + jnp.floor(size * turn)) % size  # or the first row stays first
        points = (start + at) / size
        chosen = jax.vmap(lambda ends, at: jnp.searchsorted(ends, at, side="right"))(jnp.cumsum(share, axis=1), points)
        chosen = jnp.where(anew, jnp.minimum(chosen, size - 1), jnp.arange(size)[None])
        mean = jax.nn.logsumexp(log_weight, axis=1, keepdims=True) - jnp.log(size)
        first = jnp.arange(len(chosen), dtype=jnp.int32)[:, None] * size
        return (first + chosen).reshape(-1), jnp.where(anew, mean, log_weight).reshape(-1)

    def _uniform(self, state: ParticleState, use: int) -> Array:
        """float32 [groups, 1], by each group's first key."""
        keys = fold_in_rows(fold_in_rows(state.keys, _RESAMPLING - use), state.begun)
        return jax.vmap(jax.random.uniform)(keys).reshape(-1, self.particles)[:, :1]
