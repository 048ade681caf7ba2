"""ApproximateCache caches for networks that only read both ways: a pass reads some positions again, and no others.

Such a network has no exact cache: keys and values of any position, from the second layer on, hang on what stands at all
others. How far what is said over stale ones drifts from the exact pass is measured in docs/caches.md.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.categorical import from_uniforms
from diffusion_lm.samplers.base import Canvas, Generation, Prompt, Stage, commit, decode_loop
from diffusion_lm.samplers.block_diffusion import BlockDiffusion, BlockState
from diffusion_lm.samplers.cache_policy import CachePolicy, in_block, positions
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import ConfidenceScore, FixedCount, UnmaskingSchedule

Array = jax.Array
_NO_END = -1


class PartialForward(Protocol):
    """What is asked of a network (`nn.bound.Bound` is one; so are `ClassifierFreeGuidance` and `ProcessedDenoiser` of one)."""

    def forward_positions(self, cache: Any, tokens: Array, at: Array, t: Array) -> tuple[Array, Any]:
        """Logits [B, W, V] of tokens [B, W] read at times t [B] as positions `at` int32 [B, W] of L, in sight of what
        the cache holds of the others, and the cache with what was read. L in `at` is no position."""


@struct.dataclass
class CachedCanvas(Canvas):
    """A canvas and what is known of it.

    changed  bool [B, L]  the positions whose token the last pass changed
    inside   int32 [B]    no text ends before this position; None: anywhere
    read     int32 []     positions a row that the passes ran over, made up to a width they were compiled for
    cache    keys and values of all positions
    """

    changed: Array
    inside: Array | None
    read: Array
    cache: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApproximateCacheSampler:
    """Clears a canvas as `sampler` would, block by block, each pass reading what `policy` asks for."""

    sampler: Confidence
    policy: CachePolicy
    mask: int

    @property
    def passes(self) -> int:
        """The most passes a canvas."""
        return self.sampler.passes

    def begin(self, canvas: Canvas, cache: Any, inside: Array | None) -> CachedCanvas:
        """cache: of as many slots as the canvas has positions; what it holds doesn't matter."""
        nothing = jnp.zeros_like(canvas.undecided)
        return CachedCanvas(
            **_fields(canvas), changed=nothing, inside=inside, read=jnp.zeros((), jnp.int32), cache=cache
        )

    def done(self, state: CachedCanvas) -> Array:
        return ~jnp.any(state.undecided, axis=1)

    def widths(self, length: int) -> tuple[int, ...]:
        """How many positions a pass may read."""
        return (length,) if self.policy.refresh == 1 else self.policy.widths(length)

    def needed(self, state: CachedCanvas) -> Array:
        """bool [B, L]: what the next pass must read."""
        every = self.policy.refresh or self.passes
        needed = self.policy.needed(state.undecided, state.changed) | (state.passes % every == 0)
        return needed & ~self.done(state)[:, None]

    def step(self, model: PartialForward, state: CachedCanvas) -> CachedCanvas:
        """One pass, in the least width that holds all that is needed in every row."""
        needed, widths = self.needed(state), self.widths(state.undecided.shape[1])
        most = jnp.max(jnp.sum(needed, axis=1, dtype=jnp.int32))
        passes = [functools.partial(self._pass, model, width) for width in widths]
        return jax.lax.switch(jnp.searchsorted(jnp.asarray(widths), most), passes, state, needed)

    def _pass(self, model: PartialForward, width: int, state: CachedCanvas, needed: Array) -> CachedCanvas:
        length, at = needed.shape[1], _places(needed, width)
        block_size = min(self.policy.block_size, length) or length
        part = Canvas(
            tokens=_taken(state.tokens, at, self.mask),
            undecided=_taken(state.undecided & in_block(state.undecided, block_size), at, False),
            fixed=jnp.zeros_like(at, bool),
            confidence=_taken(state.confidence, at, 0.0),
            keys=state.keys,
            passes=state.passes,
        )
        t = jnp.mean(state.undecided, axis=1, dtype=jnp.float32)
        logits, cache = model.forward_positions(state.cache, part.tokens, at, t)
        sampler = dataclasses.replace(
            self.sampler,
            eos=_NO_END,  # closes nothing in this part of the canvas: the commit below does
            draw=_Placed(draw=self.sampler.draw, at=at, length=length),
            pace=_InTime(pace=self.sampler.pace, later=self._later(state, block_size)),
        )
        logits = _without_early_end(logits, at, state.inside, self.sampler.eos)
        after = sampler.step(lambda tokens, t: logits, part)
        chosen, tokens, confidence = (
            _put(a, at, length) for a in (part.undecided & ~after.undecided, after.tokens, after.confidence)
        )
        state, was = state.replace(read=state.read + width, cache=cache), state.tokens
        state = commit(state, chosen, tokens, confidence, eos=self.sampler.eos)
        return state.replace(changed=state.tokens != was)

    def _later(self, state: CachedCanvas, block_size: int) -> Array:
        """int32 [B]: passes to keep for the blocks behind the one that is being written, an even share for each."""
        left = _blocks(state.undecided, block_size)
        return (left - 1) * self.passes // jnp.maximum(_blocks(~state.fixed, block_size), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InTime:
    """A pace that is done with its block when `later` int32 [B] passes are left."""

    pace: UnmaskingSchedule
    later: Array

    @property
    def measure(self) -> ConfidenceScore:
        return self.pace.measure

    def count(self, sure: Array, num_undecided: Array, left: Array) -> Array:
        left = jnp.maximum(left - self.later, 1)
        return jnp.maximum(self.pace.count(sure, num_undecided, left), FixedCount().count(sure, num_undecided, left))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Placed:
    """Draws at some positions what `draw` would draw there if it drew at all `length` of them."""

    draw: SamplingParams
    at: Array
    length: int

    def allowed(self, logits: Array) -> Array:
        return self.draw.allowed(logits)

    def __call__(self, keys: Array, logits: Array) -> tuple[Array, Array]:
        if self.draw.temperature == 0:
            return self.draw(keys, logits)
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2, self.length)))(keys)
        here = jnp.minimum(self.at, self.length - 1)[:, None]
        uniforms = jnp.take_along_axis(uniforms, here, axis=2)
        tokens = jax.vmap(from_uniforms)(uniforms, self.draw.sharpened(logits))
        logits = self.draw.allowed(logits)
        picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return tokens, jnp.exp(picked - jax.nn.logsumexp(logits, axis=-1))


def _places(needed: Array, width: int) -> Array:
    """int32 [B, width]: the needed positions in order, then L as often as there is room; at all of L each in its own
    place, as `forward_positions` wants them."""
    at = jnp.where(needed, positions(needed), needed.shape[1])
    return at if width == needed.shape[1] else jnp.sort(at, axis=1)[:, :width]


def _taken(a: Array, at: Array, fill: Any) -> Array:
    """a [B, L] at positions `at` [B, W], `fill` where that is none."""
    return jnp.where(at < a.shape[1], jnp.take_along_axis(a, jnp.minimum(at, a.shape[1] - 1), axis=1), fill)


def _put(part: Array, at: Array, length: int) -> Array:
    """[B, W] -> [B, length]: zeros, but for `part` at positions `at`."""
    rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((at.shape[0], length), part.dtype).at[rows, at].set(part, mode="drop")


def _blocks(where: Array, block_size: int) -> Array:
    """int32 [B]: in how many blocks there is something."""
    padded = jnp.pad(where, ((0, 0), (0, -where.shape[1] % block_size)))
    return jnp.sum(jnp.any(padded.reshape(where.shape[0], -1, block_size), axis=2), axis=1, dtype=jnp.int32)


def _without_early_end(logits: Array, at: Array, inside: Array | None, eos: int) -> Array:
    if inside is None:
        return logits
    end = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None] == eos
    return jnp.where((at < inside[:, None])[..., None] & end, -jnp.inf, logits)


def _fields(carry: Any) -> dict[str, Any]:
    return {field.name: getattr(carry, field.name) for field in dataclasses.fields(carry)}


@struct.dataclass
class ApproximateState(BlockState):
    """The carry of `ApproximateCache`. read int32 []: see `Seen`."""

    read: Array


@struct.dataclass
class ApproximateGeneration(Generation):
    """A generation, and `read` int32 []: positions a row that its passes ran over; exact passes read nfe x canvas."""

    read: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApproximateCache(BlockDiffusion):
    """Writes one canvas that holds prompt and answer, over an approximate cache.

    sampler  Confidence, at any pace; its passes are shared evenly by the blocks
    policy   Prefix, Dual or Delayed
    """

    sampler: Confidence
    policy: CachePolicy
    align: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.align:
            raise ValueError(f"approximate caches are for networks that only read both ways: align=0, not {self.align}")
        blocks = -(-self.canvas // self.policy.block_size) if self.policy.block_size else 1
        if self.sampler.passes < blocks:
            raise ValueError(
                f"passes={self.sampler.passes} are fewer than the {blocks} blocks of {self.policy.block_size} positions in "
                f"a canvas of {self.canvas}: more passes, or a wider block"
            )

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have: one a position."""
        return self.canvas

    def phases(self, length: int) -> tuple[Stage, ...]:
        """The one canvas."""
        return (Stage(sampler=self, steps=1),)

    def begin(self, model: PartialForward, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> ApproximateState:
        """Nothing is read yet."""
        writing = super().begin(model, cache, prompt, keys, length=length)
        return ApproximateState(**_fields(writing), read=jnp.zeros((), jnp.int32))

    def step(self, model: PartialForward, state: ApproximateState) -> ApproximateState:
        """The one canvas, cleared."""
        sampler = ApproximateCacheSampler(sampler=self.sampler, policy=self.policy, mask=self.mask)
        start = sampler.begin(self._blank(state), state.cache, state.inside)
        record = (lambda canvas: (canvas.tokens, canvas.confidence)) if self.record else None
        canvas, trace = decode_loop(sampler, model, start, sampler.passes, record=record)
        state = self.written(state, canvas, trace)
        return state.replace(cache=canvas.cache, read=state.read + canvas.read)

    def answer(self, state: ApproximateState, *, length: int) -> ApproximateGeneration:
        return ApproximateGeneration(**_fields(super().answer(state, length=length)), read=state.read)
