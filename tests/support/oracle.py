"""A world small enough to know everything: 3 tokens, 4 positions, one table with the probability of each of 81 texts.

Its true denoisers, under every reading, are sums over the table. Tests hand them to objectives and samplers and
compare what comes out with the table itself.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal, Full
from diffusion_lm.samplers.base import Canvas
from diffusion_lm.types import Alignment, Batch, DenseLogits

VOCAB, LENGTH, MASK = 3, 4, 3
NEVER = 99  # an end of text that no text of this world has
TEXTS = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)  # [81, 4]


@functools.cache
def truth(seed: int = 0) -> np.ndarray:
    """float64 [81]: the probability of each of TEXTS, far from independent over positions."""
    scores = np.random.default_rng(seed).normal(size=len(TEXTS))
    return np.exp(scores) / np.exp(scores).sum()


def entropy(given: int = 0) -> float:
    """Nats of all positions, given the first `given` of them."""
    p = truth().reshape((VOCAB,) * LENGTH)
    prefix = p.sum(axis=tuple(range(given, LENGTH)))
    return float(-(p * np.log(p)).sum() + (prefix * np.log(prefix)).sum())


@functools.cache
def _known() -> np.ndarray:
    """float32 [256, 4, 3]: log p(x_i | the positions that are no mask) for every canvas, by its code."""
    canvases = np.array(list(itertools.product(range(VOCAB + 1), repeat=LENGTH)))
    agrees = ((canvases[:, None] == MASK) | (canvases[:, None] == TEXTS)).all(axis=-1)  # [256, 81]
    joint = np.einsum("cn,niv->civ", agrees * truth(), np.eye(VOCAB)[TEXTS])
    with np.errstate(divide="ignore"):
        return np.log(joint / joint.sum(axis=-1, keepdims=True)).astype(np.float32)


def _code(tokens: jax.Array) -> jax.Array:
    return jnp.sum(tokens * jnp.asarray([64, 16, 4, 1]).reshape((1,) * (tokens.ndim - 1) + (-1,)), axis=-1)


def conditionals(tokens: jax.Array) -> jax.Array:
    """log p(x_i | the positions that are no mask): tokens int32 [..., 4] -> float32 [..., 4, 3]."""
    return jnp.asarray(_known())[_code(tokens)]


@functools.cache
def _bumps() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(256, LENGTH, VOCAB)).astype(np.float32)


def wrong_conditionals(tokens: jax.Array) -> jax.Array:
    """Another denoiser: the true one with fixed noise on its logits, different for every canvas."""
    return conditionals(tokens) + 0.7 * jnp.asarray(_bumps())[_code(tokens)]


def _with_later_masked(tokens: jax.Array, keep: np.ndarray) -> jax.Array:
    """[B, 4] -> [B, 4, 4]: for each position i, the tokens with those masked that keep[i, j] says i may not see."""
    return jnp.where(jnp.asarray(keep)[None], tokens[:, None], MASK)


def _at_own_place(values: jax.Array) -> jax.Array:
    """[B, 4, 4, 3] -> [B, 4, 3]: what canvas i says of position i."""
    return jnp.moveaxis(jnp.diagonal(values, axis1=1, axis2=2), -1, 1)


def _blocks(block: int) -> np.ndarray:
    return np.arange(LENGTH) // block


@dataclasses.dataclass(frozen=True)
class Oracle:
    """`types.Denoise`, true of the world for every reading (or as wrong as `rule` is)."""

    rule: object = conditionals

    def __call__(self, tokens, t, *, attention, positions, segment_ids):
        if isinstance(attention, BlockDiffusionTraining):
            noisy, clean = jnp.split(tokens, 2, axis=1)
            both = {"positions": positions, "segment_ids": segment_ids}
            return self._noisy(noisy, clean, attention.block_size), self(clean, t, attention=attention.clean, **both)
        if isinstance(attention, Causal):
            return DenseLogits(values=self._next(tokens), alignment=Alignment.NEXT)
        if isinstance(attention, BlockCausal):
            own = _blocks(attention.block_size)
            keep = own[None, :] <= own[:, None]
            return DenseLogits(values=_at_own_place(self.rule(_with_later_masked(tokens, keep))))
        assert isinstance(attention, Full)
        return DenseLogits(values=self.rule(tokens))

    def _next(self, tokens):
        keep = np.tril(np.ones((LENGTH, LENGTH), bool))
        said = self.rule(_with_later_masked(tokens, keep))[:, :-1]
        said = jnp.moveaxis(jnp.diagonal(said, offset=1, axis1=1, axis2=2), -1, 1)  # position i of i + 1
        return jnp.pad(said, ((0, 0), (0, 1), (0, 0)))

    def _noisy(self, noisy, clean, block):
        own = _blocks(block)
        before, same = own[None, :] < own[:, None], own[None, :] == own[:, None]
        seen = jnp.where(jnp.asarray(same)[None], noisy[:, None], _with_later_masked(clean, before))
        return DenseLogits(values=_at_own_place(self.rule(seen)))


def batch_of(tokens, context_mask: int = 0) -> Batch:
    """One text a row; the first `context_mask` positions are context."""
    tokens = jnp.asarray(tokens, jnp.int32)
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    ones = jnp.ones_like(tokens)
    return Batch(
        tokens=tokens, segment_ids=ones, positions=at, context_mask=at < context_mask, loss_mask=at >= context_mask
    )


def blank(rows: int, width: int = LENGTH, mask: int = MASK, *, fixed=False, prompt=0, seed=3) -> Canvas:
    """Masks, but for the tokens `prompt` where `fixed`; both broadcast to [rows, width]."""
    fixed = jnp.broadcast_to(jnp.asarray(fixed), (rows, width))
    return Canvas(
        tokens=jnp.where(fixed, prompt, mask),
        undecided=~fixed,
        fixed=fixed,
        confidence=fixed.astype(jnp.float32),
        keys=jax.random.split(jax.random.key(seed), rows),
        step=jnp.zeros((), jnp.int32),
    )


@struct.dataclass
class Read:
    """The oracle's cache: the tokens that have been read, in slots behind one another."""

    tokens: jax.Array
    length: jax.Array


@dataclasses.dataclass(frozen=True)
class OracleModel:
    """`CachedDenoiser` over the world: a text is one begin token and then the world's positions."""

    slots: int

    def empty(self, rows: int) -> Read:
        return Read(tokens=jnp.full((rows, self.slots), MASK, jnp.int32), length=jnp.zeros(rows, jnp.int32))

    def extend(self, cache: Read, tokens, count, attention):
        """Next-token logits at each of `tokens`, and the cache with the first count[b] of them."""
        width = tokens.shape[1]
        said = []
        for i in range(width):  # what the text up to and with token i says of the next
            read = self._write(cache, tokens, jnp.full_like(count, i + 1))
            said.append(self._said_at(read.tokens, read.length - 1, 1)[:, 0])
        return DenseLogits(values=jnp.stack(said, axis=1), alignment=Alignment.NEXT), self._write(cache, tokens, count)

    def draft_and_verify(self, cache: Read, tokens, count, masks, causal=False):
        """What `extend` says, and `denoise_canvas` of masks after each of the tokens (causal: one place further)."""
        said, after = self.extend(cache, tokens, count, None)
        canvas, ahead = jnp.full((len(count), masks + causal), MASK), []
        for i in range(tokens.shape[1]):
            behind = self._write(cache, tokens, jnp.full_like(count, i + 1))
            ahead.append(self.denoise_canvas(behind, canvas, None)[:, int(causal) :])
        return said, DenseLogits(values=jnp.concatenate(ahead, axis=1)), after

    def truncate(self, cache: Read, count):
        length = cache.length - count
        kept = jnp.arange(self.slots, dtype=jnp.int32)[None] < length[:, None]
        return Read(tokens=jnp.where(kept, cache.tokens, MASK), length=length)

    def resize(self, cache: Read, rows, slots=None):
        return Read(tokens=jnp.take(cache.tokens, rows, axis=0), length=jnp.take(cache.length, rows))

    def denoise_canvas(self, cache: Read, canvas, t):
        read = self._write(cache, canvas, jnp.full_like(cache.length, canvas.shape[1]))
        return self._said_at(read.tokens, cache.length - 1, canvas.shape[1])

    def _write(self, cache: Read, tokens, count):
        at = jnp.arange(self.slots, dtype=jnp.int32)[None] - cache.length[:, None]
        new = (at >= 0) & (at < count[:, None])
        piece = jnp.take_along_axis(tokens, jnp.clip(at, 0, tokens.shape[1] - 1), axis=1)
        return Read(tokens=jnp.where(new, piece, cache.tokens), length=cache.length + count)

    def _said_at(self, tokens, start, width):
        """Logits of the world's positions start .. start + width - 1, whose slots begin at 1; [B, width, 3]."""
        logits = conditionals(tokens[:, 1 : 1 + LENGTH])
        at = jnp.clip(start[:, None] + jnp.arange(width, dtype=jnp.int32)[None], 0, LENGTH - 1)
        return jnp.take_along_axis(logits, at[..., None], axis=1)


def p_value(tokens, p=None) -> float:
    """Chi-square of texts [N, 4] against the world's table (or p): how likely a sample is as odd as this."""
    from scipy import stats

    code = np.asarray(tokens) @ np.array([27, 9, 3, 1])
    counts = np.bincount(code, minlength=len(TEXTS))
    expected = truth() if p is None else p
    expected = expected / expected.sum() * len(code)
    assert expected.min() > 2, "too few draws for a chi-square"
    return float(stats.chisquare(counts, expected).pvalue)


def orders():
    """All orders in which four positions can be revealed."""
    return list(itertools.permutations(range(LENGTH)))


def log_p_in_order(rule, order) -> np.ndarray:
    """[81]: log probability of each text when its positions are written one by one in `order`."""
    canvas = np.full_like(TEXTS, MASK)
    total = np.zeros(len(TEXTS))
    rows = np.arange(len(TEXTS))
    for i in order:
        said = jax.nn.log_softmax(rule(jnp.asarray(canvas)), axis=-1)
        total += np.asarray(said)[rows, i, TEXTS[:, i]]
        canvas[:, i] = TEXTS[:, i]
    return total


def log_mean_exp(values: np.ndarray, axis: int) -> np.ndarray:
    top = values.max(axis=axis)
    return top + np.log(np.exp(values - np.expand_dims(top, axis)).sum(axis=axis)) - math.log(values.shape[axis])
