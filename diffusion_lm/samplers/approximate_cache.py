"""Approximate caches for networks with full attention: a step computes some positions anew, and no others.

Such a network has no exact cache: from the second layer on, keys and values of any position depend on all tokens. How
far predictions over stale ones drift from the exact ones is measured in docs/results/cache_drift.md.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.samplers.base import Canvas, CanvasSampler, Query, commit, fields_of, fold_in_rows
from diffusion_lm.samplers.cache_policy import CachePolicy
from diffusion_lm.samplers.canvas_blocks import block_steps_left, first_free, in_block, positions
from diffusion_lm.samplers.confidence import Confidence

Array = jax.Array


class PartialForward(Protocol):
    """What an approximate cache needs of a network (`BoundModel` and `ProcessedDenoiser` have it)."""

    def forward_positions(self, cache: Any, tokens: Array, at: Array, t: Array) -> tuple[Array, Any]:
        """Logits [B, W, V] of tokens [B, W] at times t [B] and positions `at` int32 [B, W] of L, which attend to one
        another and to the cache's other positions; and the cache with these. L in `at` is no position."""


@struct.dataclass
class CachedCanvas(Canvas):
    """A canvas; changed bool [B, L], the positions whose token the previous step changed; positions_computed int32 [],
    positions a row in all steps, padding to the compiled widths included."""

    changed: Array
    positions_computed: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApproximateCacheSampler(CanvasSampler):
    """Denoises a canvas as `sampler` would, block by block, each with its share of the steps; a step queries the
    positions that `policy` names.

    width  how many positions a step queries, which must be enough: see `variants`
    """

    sampler: Confidence
    policy: CachePolicy
    mask: int
    width: int = 0

    def __post_init__(self):
        if not isinstance(self.sampler, Confidence):
            raise ValueError(f"approximate caches work with Confidence; got {type(self.sampler).__name__}")
        if self.sampler.block_length:
            raise ValueError("an approximate cache's policy has the blocks: leave block_length out")

    @property
    def denoising_steps(self) -> int:
        return self.sampler.denoising_steps

    def init(self, canvas: Canvas) -> CachedCanvas:
        none = jnp.zeros_like(canvas.undecided)
        return CachedCanvas(**fields_of(canvas), changed=none, positions_computed=jnp.zeros((), jnp.int32))

    def variants(self, length: int) -> tuple["ApproximateCacheSampler", ...]:
        """One for each width."""
        widths = (length,) if self.policy.refresh_every == 1 else self.policy.widths(length)
        return tuple(dataclasses.replace(self, width=width) for width in widths)

    def variant(self, state: CachedCanvas) -> Array:
        """The least width that holds all needed positions of every row."""
        widths = jnp.asarray([variant.width for variant in self.variants(state.tokens.shape[1])])
        return jnp.searchsorted(widths, jnp.max(jnp.sum(self.needed(state), axis=1, dtype=jnp.int32)))

    def needed(self, state: CachedCanvas) -> Array:
        """bool [B, L]: what the next step must compute."""
        every = self.policy.refresh_every or self.denoising_steps
        needed = self.policy.needed(state.undecided, state.changed, first_free(state.fixed)) | (state.step % every == 0)
        return needed & ~self.done(state)[:, None]

    def query(self, state: CachedCanvas) -> Query:
        at = self._positions(state)
        t = jnp.mean(state.undecided, axis=1, dtype=jnp.float32)
        return Query(_take(state.tokens, at, self.mask), t, positions=at)

    def update(self, state: CachedCanvas, logits: Array) -> CachedCanvas:
        length, at = state.tokens.shape[1], self._positions(state)
        block_size = min(self.policy.block_size, length) or length
        origin = first_free(state.fixed)
        undecided = _take(state.undecided & in_block(state.undecided, block_size, origin), at, False)
        keys = fold_in_rows(state.keys, state.step)
        tokens, confidence = self.sampler.sampling(keys, logits, positions=at, length=length)
        steps_left = block_steps_left(state, self.denoising_steps, block_size, origin)
        chosen = self.sampler.choose(logits, tokens, confidence, undecided, steps_left)
        rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]
        whole = [jnp.zeros((at.shape[0], length), a.dtype).at[rows, at].set(a, mode="drop")
                 for a in (chosen, tokens, confidence)]  # fmt: skip
        after = commit(state, *whole, eos=self.sampler.eos)
        computed = state.positions_computed + at.shape[1]
        return after.replace(changed=after.tokens != state.tokens, positions_computed=computed)

    def _positions(self, state: CachedCanvas) -> Array:
        """int32 [B, width]: the needed positions in order, then L as often as there is room; at all of L each in its
        own place, as `forward_positions` expects."""
        needed = self.needed(state)
        at = jnp.where(needed, positions(needed), needed.shape[1])
        return at if self.width in (0, needed.shape[1]) else jnp.sort(at, axis=1)[:, : self.width]


def _take(a: Array, at: Array, fill: Any) -> Array:
    """a [B, L] at positions `at` [B, W], `fill` where that is none."""
    return jnp.where(at < a.shape[1], jnp.take_along_axis(a, jnp.minimum(at, a.shape[1] - 1), axis=1), fill)
