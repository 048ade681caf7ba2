"""Sequential Monte Carlo: canvases are proposals, weighted by the network's autoregressive likelihood and resampled.

The target is the network's own autoregressive distribution. A canvas that is denoised in a few steps samples tokens
independently of one another; the weights correct just that.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.base import CachedDenoiser, Canvas, Prompt, fields_of, fold_in_rows, gather_tokens
from diffusion_lm.samplers.block_diffusion import BlockDiffusion, BlockState
from diffusion_lm.samplers.sampling_params import SamplingParams, suppress

Array = jax.Array
_RESAMPLING = 2**31 - 2  # a count of canvases that no row draws with


@struct.dataclass
class ParticleState(BlockState):
    """The state of `BlockDiffusion`, and log_weight float32 [B]: log p - log q of each row's text."""

    log_weight: Array = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticleSampler(BlockDiffusion):
    """Block diffusion of rows in groups of `num_particles`, each group after one prompt. After a canvas a row's weight
    is multiplied by p(canvas | text), in one causal pass, over the probability it was sampled with. A group whose
    effective sample size falls to half is resampled by weight (systematic resampling; Doucet and Johansen 2009,
    sections 3.4 and 3.5). At the end every group is: its rows are then samples of the autoregressive distribution,
    exactly so as `num_particles` grows.

    The weights are exact because masks are revealed in an order that doesn't depend on tokens: proposals must be
    `Ancestral` on masks, at temperature 1 (ValueError otherwise). One causal pass a canvas also appends it to the
    cache.
    """

    num_particles: int
    separable = False

    def __post_init__(self):
        super().__post_init__()
        plain = self.align == 1 and not self.record and not self.self_cond_dim
        if not (plain and isinstance(self.sampler, Ancestral) and isinstance(self.sampler.process, Absorbing)):
            raise ValueError(
                "particles need ancestral canvases of masks over a causal cache, unrecorded and not self-conditioned"
            )
        if dataclasses.replace(self.sampler.sampling, suppressed=()) != SamplingParams():
            raise ValueError("particles need the network's own distribution: temperature 1, no top_k, top_p or min_p")
        if self.num_particles < 2:
            raise ValueError(f"num_particles must be at least 2; got {self.num_particles}")

    def init(
        self, network: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, max_new_tokens: int
    ) -> ParticleState:
        """Rows i * num_particles to (i + 1) * num_particles - 1 are a group: they need the same prompt."""
        rows = len(prompt.length)
        if rows % self.num_particles or prompt.suffix is not None:
            raise ValueError(f"{rows} prompts must be groups of {self.num_particles} particles, and have no suffix")
        state = super().init(network, cache, prompt, keys, max_new_tokens=max_new_tokens)
        return ParticleState(**fields_of(state), log_weight=jnp.zeros(rows))

    def step(self, network: CachedDenoiser, state: ParticleState) -> ParticleState:
        """A canvas in every row, its weight, and resampling where few rows carry all of the weight."""
        denoised = self.denoised(network, state)
        canvas, going = denoised.state, ~state.finished
        last = jnp.take_along_axis(state.text, state.filled[:, None] - 1, axis=1)
        tokens = jnp.where(going[:, None], jnp.concatenate([last, canvas.tokens], axis=1), 0)
        before = network.truncate(state.cache, going.astype(jnp.int32))
        head, cache = network.extend(before, tokens, jnp.where(going, tokens.shape[1], 0), Causal())
        log_ratio = self._log_ratio(canvas, head.logits()[:, :-1])
        written = self.written(state, denoised)
        state = written.replace(
            cache=cache,
            nfe=written.nfe + 1,
            log_weight=state.log_weight + jnp.where(going, log_ratio, 0.0),
        )
        # at the end every group is resampled, so that its rows have equal weights
        end = jnp.all(state.finished)
        rows, log_weight = self._resampled(state, jnp.where(end, self.num_particles + 1, self.num_particles / 2))
        return state.replace(
            text=jnp.take(state.text, rows, axis=0),
            confidence=jnp.take(state.confidence, rows, axis=0),
            filled=jnp.take(state.filled, rows),
            finished=jnp.take(state.finished, rows),
            cache=network.resize(state.cache, rows),
            log_weight=log_weight,
        )

    def _log_ratio(self, canvas: Canvas, logits: Array) -> Array:
        """float32 [B]: log p - log q of the canvas, up to an end of text."""
        logits = suppress(self.sampler.sampling.allowed(logits), (self.mask,))
        log_p = gather_tokens(jax.nn.log_softmax(logits, axis=-1), canvas.tokens)
        ends = canvas.tokens == self.sampler.eos
        counted = ((jnp.cumsum(ends, axis=1) - ends) == 0) & ~canvas.fixed
        log_q = jnp.log(jnp.where(counted, canvas.confidence, 1.0))
        return jnp.sum(jnp.where(counted, log_p - log_q, 0.0), axis=1)

    def _resampled(self, state: ParticleState, least: Array) -> tuple[Array, Array]:
        """Which row each row continues, int32 [B], and its log weight: groups of effective sample size up to `least`
        are resampled systematically (one uniform number a group), and then have equal weights."""
        size = self.num_particles
        log_weight = state.log_weight.reshape(-1, size)
        share = jax.nn.softmax(log_weight, axis=1)
        anew = (1.0 / jnp.sum(share**2, axis=1) <= least)[:, None]
        start, turn = (  # float32 [groups, 1], by each group's first key
            jax.vmap(jax.random.uniform)(
                fold_in_rows(fold_in_rows(state.keys, _RESAMPLING - use), state.num_canvases)
            ).reshape(-1, size)[:, :1]
            for use in (0, 1)
        )
        at = (jnp.arange(size, dtype=jnp.float32)[None] + jnp.floor(size * turn)) % size  # or the first row stays first
        points = (start + at) / size
        chosen = jax.vmap(lambda ends, at: jnp.searchsorted(ends, at, side="right"))(jnp.cumsum(share, axis=1), points)
        chosen = jnp.where(anew, jnp.minimum(chosen, size - 1), jnp.arange(size)[None])
        mean = jax.nn.logsumexp(log_weight, axis=1, keepdims=True) - jnp.log(size)
        first = jnp.arange(len(chosen), dtype=jnp.int32)[:, None] * size
        return (first + chosen).reshape(-1), jnp.where(anew, mean, log_weight).reshape(-1)
