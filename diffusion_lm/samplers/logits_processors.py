"""What may be written next, as the user says: a rule on the network's logits, given the text as far as it stands.

`ProcessedDenoiser` puts a rule between a network and any writer, so that every sampler keeps to it.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import AttentionPattern
from diffusion_lm.types import Alignment, LogitsHead

Array = jax.Array
_FORBIDDEN = 1e4  # nats: never drawn, unless everything is forbidden


class LogitsProcessor(Protocol):
    """A frozen dataclass, or a function: it must be hashable, since programs are compiled for it."""

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        """float32 [V]: what logits [V] for column `at` (int32 []) of text int32 [S] become.

        Where nothing stands, the text has the id V: everywhere from `at` on when the network reads causally, and at
        the masks of a canvas. (Noise that isn't masks looks like text.) At least one token must stay possible.
        """


@dataclasses.dataclass(frozen=True)
class Chain:
    """All of these, in order."""

    constraints: tuple[LogitsProcessor, ...]

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        for constraint in self.constraints:
            logits = constraint(logits, text, at)
        return logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuppressTokens:
    """Tokens that are never written."""

    tokens: tuple[int, ...]

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        del text, at
        return logits.at[jnp.array(self.tokens, jnp.int32)].set(-jnp.inf) if self.tokens else logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyPenalty:
    """Takes `nats` from a token's logit for each time it stands within `window` columns (0: anywhere) of its own.

    (A share of the logit, as in arXiv 1909.05858, section 4.1, would depend on what all logits have in common.) What
    one pass writes side by side doesn't see itself.
    """

    nats: float
    window: int = 0

    def __post_init__(self):
        if not 0 < self.nats <= 100:
            raise ValueError(f"a repetition costs more than 0 and at most 100 nats, not {self.nats}")
        if self.window < 0:
            raise ValueError(f"window must be at least 1 column (or 0: all), not {self.window}")

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        near = jnp.ones(text.shape, jnp.float32)
        if self.window:
            far = jnp.abs(jnp.arange(text.shape[0], dtype=jnp.int32) - at)
            near = ((far > 0) & (far <= self.window)).astype(jnp.float32)
        count = jnp.zeros(logits.shape[0] + 1).at[text].add(near)
        return logits - self.nats * count[:-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoRepeatNGram:
    """No run of `size` tokens twice, where anything else can be written. One pass's own tokens don't see each other."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a run has at least 1 token, not {self.size}")

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        vocab, there = logits.shape[0], jnp.arange(text.shape[0], dtype=jnp.int32)
        forbidden = jnp.zeros(vocab + 1, bool)
        for before in range(self.size):  # `at` is the run's token number `before`
            others = [i - before for i in range(self.size) if i != before]
            same = there != at
            for i in others:
                here = _token(text, at + i, vocab)
                same &= (here != vocab) & (_token(text, there + i, vocab) == here)
            forbidden = forbidden.at[text].max(same)
        return logits - _FORBIDDEN * forbidden[:-1]


def _token(text: Array, column: Array, vocab: int) -> Array:
    """What stands there, `vocab` outside."""
    inside = (column >= 0) & (column < text.shape[0])
    return jnp.where(inside, text[jnp.clip(column, 0, text.shape[0] - 1)], vocab)


@struct.dataclass
class CachedText:
    """A cache and the text that it holds: int32 [B, S], its first length[b] columns; all of them where an approximate
    cache holds the row as it was last read."""

    inner: Any
    text: Array
    length: Array


@struct.dataclass
class ProcessedDenoiser:
    """A `samplers.base.Model` whose logits keep to a constraint.

    mask  the id V
    """

    model: Any
    constraint: LogitsProcessor = struct.field(pytree_node=False)
    mask: int = struct.field(pytree_node=False)

    def empty_cache(self, rows: int, slots: int) -> CachedText:
        """The network's own and no text."""
        text = jnp.full((rows, slots), self.mask, jnp.int32)
        return CachedText(inner=self.model.empty_cache(rows, slots), text=text, length=jnp.zeros(rows, jnp.int32))

    def extend(
        self, cache: CachedText, tokens: Array, count: Array, attention: AttentionPattern
    ) -> tuple[LogitsHead, CachedText]:
        head, inner = self.model.extend(cache.inner, tokens, count, attention)
        text, at = self._with(cache, tokens)
        said = self._said(head, text, at + 1, at + 1)
        return said, CachedText(inner=inner, text=text, length=cache.length + count)

    def fork(
        self, cache: CachedText, tokens: Array, count: Array, masks: int
    ) -> tuple[LogitsHead, LogitsHead, CachedText]:
        """In the canvas behind a token stands nothing, for the rule as for the network."""
        head, ahead, inner = self.model.fork(cache.inner, tokens, count, masks)
        text, at = self._with(cache, tokens)
        end = jnp.repeat(at + 1, masks, axis=1)
        columns = end + jnp.tile(jnp.arange(masks, dtype=jnp.int32), at.shape[1])[None]
        known = CachedText(inner=inner, text=text, length=cache.length + count)
        return self._said(head, text, at + 1, at + 1), self._said(ahead, text, columns, end), known

    def _said(self, head: LogitsHead, text: Array, at: Array, end: Array) -> "_Head":
        return _Head(inner=head, text=text, at=at, end=end, constraint=self.constraint, mask=self.mask)

    def truncate(self, cache: CachedText, count: Array) -> CachedText:
        return cache.replace(inner=self.model.truncate(cache.inner, count), length=cache.length - count)

    def resize(self, cache: CachedText, rows: Array, slots: int | None = None) -> CachedText:
        text = jnp.take(cache.text, rows, axis=0)
        more = ((0, 0), (0, 0 if slots is None else slots - text.shape[1]))
        return CachedText(
            inner=self.model.resize(cache.inner, rows, slots),
            text=jnp.pad(text, more, constant_values=self.mask),
            length=jnp.take(cache.length, rows),
        )

    def read_canvas(self, cache: CachedText, canvas: Array, t: Array, **vectors) -> Array:
        logits = self.model.read_canvas(cache.inner, canvas, t, **vectors)
        return self._kept(logits, *self._with(cache, canvas))

    def forward_positions(self, cache: CachedText, tokens: Array, at: Array, t: Array) -> tuple[Array, CachedText]:
        """See `approximate.PartialForward`. The rule sees what the network does: these tokens, and the others as they were
        last read."""
        logits, inner = self.model.forward_positions(cache.inner, tokens, at, t)
        text = jax.vmap(lambda row, i, new: row.at[i].set(new, mode="drop"))(cache.text, at, tokens)
        # the logits at no position mean nothing, but a rule is asked of columns only
        said = self._kept(logits, text, jnp.minimum(at, text.shape[1] - 1))
        return said, cache.replace(inner=inner, text=text)

    def expected_embedding(self, logits: Array) -> Array:
        return self.model.expected_embedding(logits)

    def _kept(self, logits: Array, text: Array, at: Array) -> Array:
        """Logits [B, T, V] of columns `at` [B, T] of the text [B, S]."""
        return jax.vmap(jax.vmap(self.constraint, (0, None, 0)))(logits, text, at)

    def _with(self, cache: CachedText, tokens: Array) -> tuple[Array, Array]:
        """The text with [B, T] more tokens behind it, [B, S], and their columns [B, T]. (A model that reads no text
        into its cache has S = 0: there the canvas is all of the text.)"""
        at = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        columns = jnp.arange(cache.text.shape[1] or tokens.shape[1], dtype=jnp.int32)[None]
        if not cache.text.shape[1]:
            return tokens, jnp.broadcast_to(columns, tokens.shape)
        text = jnp.where(columns < cache.length[:, None], cache.text, self.mask)
        return jax.vmap(lambda row, i, new: row.at[i].set(new, mode="drop"))(text, at, tokens), at


@struct.dataclass
class _Head:
    """What the network says of columns `at` [B, T], constrained; from `end` [B, T] on it doesn't see the text."""

    inner: Any
    text: Array
    at: Array
    end: Array
    constraint: LogitsProcessor = struct.field(pytree_node=False)
    mask: int = struct.field(pytree_node=False)

    @property
    def alignment(self) -> Alignment:
        return self.inner.alignment

    def gather(self, index: Array) -> "_Head":
        at, end = (jnp.take_along_axis(a, index, axis=1) for a in (self.at, self.end))
        return self.replace(inner=self.inner.gather(index), at=at, end=end)

    def logits(self) -> Array:
        return jax.vmap(jax.vmap(self._one, (0, None, 0, 0)))(self.inner.logits(), self.text, self.at, self.end)

    def _one(self, logits: Array, text: Array, at: Array, end: Array) -> Array:
        seen = jnp.where(jnp.arange(text.shape[0], dtype=jnp.int32) < end, text, self.mask)
        return self.constraint(logits, seen, at)
