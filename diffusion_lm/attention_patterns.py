"""Attention patterns: which positions attend to which, and all that follows from it.

A pattern is one frozen dataclass. It says which keys each query attends to, which token its logits predict, how a row
is laid out, and which kernels can compute it. No other file asks a pattern for its class: a new
pattern is one class, here or in a user's own file.

A pattern lays out a row as one or several *parts* of tokens (a text; its noisy copy and itself; a text and drafts).
`join` concatenates parts and `split` takes a row apart again.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array


class Alignment(enum.Enum):
    """Which token the logits at position i predict."""

    SAME = "same"  # the token at i
    NEXT = "next"  # the token at i + 1


@struct.dataclass
class KeyRange:
    """What each of L queries attends to in one source of S keys: the keys first..last of its own document.

    Args:
        first, last: int32 [1 or B, L], indices of keys; the range is empty where last < first.
        index: int32 [1 or B, L], each query's own place on the scale of the keys. None: query i stands at key i.
        query_segment_ids, key_segment_ids: int32 [B, L] and [B, S], documents; None where a row is one document.
        keys: static, the slice of the row's keys that `first` and `last` count from. None: the whole row, or the cache.
        window: static, (query start, query stop) -> (key start, key stop): all that those queries attend to.
        block_size: static, non-zero where each block of that size attends to exactly itself in this source.
    """

    first: Array
    last: Array
    index: Array | None
    query_segment_ids: Array | None
    key_segment_ids: Array | None
    window: Callable[[int, int], tuple[int, int]] = struct.field(pytree_node=False)
    keys: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
    block_size: int = struct.field(pytree_node=False, default=0)

    def chunked(self, count: int, size: int) -> "KeyRange":
        """first, last and query_segment_ids as `count` chunks, [count, 1 or B, size]; queries past L see no key."""

        def chunks(a: Array, filler: int) -> Array:
            a = jnp.pad(a, ((0, 0), (0, count * size - a.shape[1])), constant_values=filler)
            return jnp.moveaxis(a.reshape(-1, count, size), 1, 0)

        segment_ids = None if self.query_segment_ids is None else chunks(self.query_segment_ids, 0)
        first, last = chunks(self.first, 0), chunks(self.last, -1)
        return self.replace(first=first, last=last, index=None, query_segment_ids=segment_ids)

    def sliding(self, size: int) -> "KeyRange":
        """The keys of this range that are less than `size` positions away: sliding-window attention."""
        index = jnp.arange(self.first.shape[1], dtype=jnp.int32)[None] if self.index is None else self.index

        def window(start: int, stop: int) -> tuple[int, int]:
            begin, end = self.window(start, stop)
            begin, end = (
                (begin, end) if self.index is not None else (max(begin, start - size + 1), min(end, stop + size))
            )
            return begin, max(begin, end)

        first, last = jnp.maximum(self.first, index - size + 1), jnp.minimum(self.last, index + size - 1)
        block_size = self.block_size if self.block_size <= size else 0
        return self.replace(first=first, last=last, window=window, block_size=block_size)

    def before_canvas(self, size: int) -> "KeyRange":
        """The keys that a canvas attends to under a window of `size` positions: all of its own, and of clean text
        before it those that are less than `size` away from its first position."""
        index = jnp.arange(self.first.shape[1], dtype=jnp.int32)[None] if self.index is None else self.index
        return self.replace(
            first=jnp.where(self.last >= index, self.first, jnp.maximum(self.first, self.last - size + 2))
        )


Ranges = tuple[tuple[KeyRange, ...], ...]  # for each group of queries, its ranges in one source of keys or several


def valid_mask(ranges: Ranges) -> Array | None:
    """bool [B, positions of the row]: which positions belong to a document; None where all do."""
    segment_ids = [group[0].query_segment_ids for group in ranges]
    if segment_ids[0] is None:
        return None
    return (segment_ids[0] if len(segment_ids) == 1 else jnp.concatenate(segment_ids, axis=1)) > 0


def cache_key_range(length: Array, slots: int, index: Array) -> KeyRange:
    """Queries that attend to the filled slots of a cache.

    Args:
        length: int32 [B], how many slots each row has filled.
        slots: how many slots there are.
        index: int32 [1 or B, L], the slot at which each query stands.
    """
    last = jnp.broadcast_to(length[:, None] - 1, (length.shape[0], index.shape[1]))
    return KeyRange(jnp.zeros_like(last), last, index, None, None, window=lambda start, stop: (0, slots))


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
    """Base of all patterns: a row of one part, whose logits predict the token at the same position."""

    @property
    def alignments(self) -> tuple[Alignment, ...]:
        """Which token the logits of each part predict."""
        return (Alignment.SAME,)

    @property
    def may_be_noisy(self) -> bool:
        """Whether the first part may hold noisy tokens, so that self-conditioning applies to it."""
        return True

    def noisy(self, row: int) -> tuple[int, int]:
        """Which of a row's positions are a canvas or drafts, where adapters of noisy positions act: from the first to
        the second, excluded. None are by default."""
        return 0, 0

    @property
    def granularity(self) -> int:
        """A row may be cut at multiples of so many positions: into chunks of queries, or where a cache ends."""
        return 1

    @property
    def kernels(self) -> tuple[Literal["causal", "full"] | None, ...]:
        """For each group of `key_ranges`: whether it is plain causal or plain full attention over its own keys."""
        return (None,)

    def key_ranges(self, length: int, segment_ids: Array | None = None) -> Ranges:
        """What the queries of a text of `length` positions attend to, in groups of equally many queries.

        Args:
            length: positions of the text (for a row that holds it twice: of each copy).
            segment_ids: int32 [B, length], documents; None where each row is one.
        """
        raise NotImplementedError

    def row_length(self, length: int) -> int:
        """Positions of the row that a text of `length` positions is laid out in."""
        return length

    def repeat(self, a: Array) -> Array:
        """What belongs to a text's positions, [B, L, ...], for each position of the row."""
        return a

    def join(self, *parts: Array) -> Array:
        """Parts [B, ., ...] (tokens, times, vectors) -> the row's, concatenated along axis 1."""
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def split(self, row: Array) -> tuple[Array, ...]:
        """The inverse of `join`, for arrays with one entry a position of the row."""
        return (row,)

    def pad(self, first: Array) -> Array:
        """The first part's [B, ., ...], with zeros for all other parts."""
        return first

    def previous(self, hidden: Array, segment_ids: Array | None, before: Array | None) -> Array:
        """What a head that predicts the next token needs at each position of the row: see `models.base.ModelSpec`.

        Positions whose logits predict the same position's token get the hidden state of the position before them, so
        that the logits of the token at i come from i - 1. The first position of a document keeps its own (as Dream
        does, arXiv 2508.15487).

        Args:
            hidden: [B, row, E].
            segment_ids: int32 [B, L] or None.
            before: [B, E], the hidden state of the last position in the cache; None without a cache.
        """
        return _delayed(hidden, segment_ids, before)

    def num_pairs(self, length: int, window: int = 0) -> int:
        """How many (query, key) pairs attention computes for one document of `length` positions, without a cache;
        window: of a sliding window, 0 for none."""
        with jax.ensure_compile_time_eval():
            ranges = [r.sliding(window) if window else r for group in self.key_ranges(length) for r in group]
            sizes = [np.inf if r.keys is None else r.keys[1] - r.keys[0] for r in ranges]
            ends = [
                np.minimum(r.last, min(size, self.row_length(length)) - 1)
                for r, size in zip(ranges, sizes, strict=True)
            ]
            return sum(int(np.sum(np.maximum(end - r.first + 1, 0))) for r, end in zip(ranges, ends, strict=True))


@dataclasses.dataclass(frozen=True)
class Causal(AttentionPattern):
    """Each position attends to itself and to those before it; its logits predict the next token."""

    @property
    def alignments(self) -> tuple[Alignment, ...]:
        return (Alignment.NEXT,)

    @property
    def may_be_noisy(self) -> bool:
        return False

    @property
    def kernels(self):
        return ("causal",)

    def key_ranges(self, length: int, segment_ids: Array | None = None) -> Ranges:
        return ((_up_to_block(1, length, segment_ids),),)

    def previous(self, hidden: Array, segment_ids: Array | None, before: Array | None) -> Array:
        return hidden


@dataclasses.dataclass(frozen=True)
class Full(AttentionPattern):
    """Each position attends to its whole document; its logits predict its own token."""

    def noisy(self, row: int) -> tuple[int, int]:
        return 0, row

    @property
    def kernels(self):
        return ("full",)

    def key_ranges(self, length: int, segment_ids: Array | None = None) -> Ranges:
        index = jnp.arange(length, dtype=jnp.int32)[None]
        first, last, both = jnp.zeros_like(index), jnp.full_like(index, length - 1), (segment_ids, segment_ids)
        return ((KeyRange(first, last, None, *both, window=lambda start, stop: (0, length)),),)


@dataclasses.dataclass(frozen=True)
class BlockCausal(AttentionPattern):
    """Each position attends to its own block of `block_size` positions and to all blocks before it."""

    block_size: int

    @property
    def granularity(self) -> int:
        return self.block_size

    def key_ranges(self, length: int, segment_ids: Array | None = None) -> Ranges:
        return ((_up_to_block(self.block_size, length, segment_ids),),)


@dataclasses.dataclass(frozen=True)
class BlockDiffusionTraining(AttentionPattern):
    """[noisy ; clean], each of the text's length, in one forward pass (BD3-LM, arXiv 2503.09573, section 3).

    A noisy block attends to itself and to the clean blocks before it; its logits predict the same positions. The clean
    part attends to itself as `clean` says.
    """

    block_size: int
    clean: Causal | BlockCausal

    def noisy(self, row: int) -> tuple[int, int]:
        return 0, row // 2

    @property
    def alignments(self) -> tuple[Alignment, ...]:
        return Alignment.SAME, *self.clean.alignments

    @property
    def granularity(self) -> int:
        return self.block_size

    @property
    def kernels(self):
        return None, *self.clean.kernels

    def key_ranges(self, length: int, segment_ids: Array | None = None) -> Ranges:
        size, index = self.block_size, jnp.arange(length, dtype=jnp.int32)[None]
        start, both = index // size * size, (segment_ids, segment_ids)
        itself = KeyRange(
            start, start + size - 1, None, *both, window=lambda a, b: (a, b), keys=(0, length), block_size=size
        )
        before = KeyRange(
            jnp.zeros_like(index), start - 1, None, *both,
            window=lambda a, b: (0, (b - 1) // size * size), keys=(length, 2 * length),
        )  # fmt: skip
        ((clean,),) = self.clean.key_ranges(length, segment_ids)
        return (itself, before), (clean.replace(keys=(length, 2 * length)),)

    def row_length(self, length: int) -> int:
        return 2 * length

    def repeat(self, a: Array) -> Array:
        return jnp.concatenate([a, a], axis=1)

    def split(self, row: Array) -> tuple[Array, ...]:
        return tuple(jnp.split(row, 2, axis=1))

    def pad(self, first: Array) -> Array:
        return jnp.concatenate([first, jnp.zeros_like(first)], axis=1)

    def previous(self, hidden: Array, segment_ids: Array | None, before: Array | None) -> Array:
        noisy, clean = self.split(hidden)
        starts = (jnp.arange(noisy.shape[1], dtype=jnp.int32) % self.block_size == 0)[None, :, None]
        # A block's first position follows the clean text, as it follows the cache when sampling.
        noisy = jnp.where(starts, _delayed(clean, segment_ids, before, noisy), _delayed(noisy, segment_ids, before))
        return self.join(noisy, self.clean.previous(clean, segment_ids, before))


@dataclasses.dataclass(frozen=True)
class DraftAndVerify(AttentionPattern):
    """[text ; drafts]: after each of `num_tokens` text positions a canvas of `draft_length` masks, for every place at
    which the text may turn out to end, in one pass behind a cache (the idea is TiDAR's, arXiv 2511.08923).

    The text attends causally and predicts the next token. Draft i attends to text 0..i and to itself both ways, and
    predicts its own positions; with `causal` it goes on as the text does, one way, and predicts the next tokens. All
    attend to the cache.
    """

    num_tokens: int
    draft_length: int
    causal: bool = False

    def noisy(self, row: int) -> tuple[int, int]:
        return self.num_tokens, row

    @property
    def alignments(self) -> tuple[Alignment, ...]:
        return Alignment.NEXT, Alignment.NEXT if self.causal else Alignment.SAME

    def key_ranges(self, length: int, segment_ids: Array | None = None) -> Ranges:
        text = jnp.arange(self.num_tokens, dtype=jnp.int32)
        number = jnp.repeat(text, self.draft_length)
        start, nothing = number * self.draft_length, jnp.zeros_like(text)
        inside = jnp.arange(len(number), dtype=jnp.int32)

        def key_range(first: list[Array], last: list[Array], index: list[Array], begin: int, width: int) -> KeyRange:
            first, last, index = (jnp.concatenate(a)[None] for a in (first, last, index))
            keys = begin, begin + width
            return KeyRange(first, last, index, None, None, window=lambda start, stop: (0, width), keys=keys)

        after = number + 1 + inside - start
        of_text = key_range([nothing, 0 * number], [text, number], [text, after], 0, self.num_tokens)
        ends = [nothing - 1, inside if self.causal else start + self.draft_length - 1]
        drafts = key_range([nothing, start], ends, [nothing, inside], self.num_tokens, len(number))
        return ((of_text, drafts),)

    def row_length(self, length: int) -> int:
        return self.num_tokens * (1 + self.draft_length)

    def split(self, row: Array) -> tuple[Array, ...]:
        return row[:, : self.num_tokens], row[:, self.num_tokens :]

    def previous(self, hidden: Array, segment_ids: Array | None, before: Array | None) -> Array:
        if self.causal:
            return hidden
        text, drafts = self.split(hidden)
        drafts = drafts.reshape(*text.shape[:2], self.draft_length, -1)
        drafts = jnp.concatenate([text[:, :, None], drafts[:, :, :-1]], axis=2)
        return self.join(text, drafts.reshape(text.shape[0], -1, text.shape[2]))


def _up_to_block(block_size: int, length: int, segment_ids: Array | None) -> KeyRange:
    """A text that attends to all of its blocks up to the query's own."""
    index = jnp.arange(length, dtype=jnp.int32)[None]
    last, both = index // block_size * block_size + block_size - 1, (segment_ids, segment_ids)
    return KeyRange(
        jnp.zeros_like(index), last, None, *both,
        window=lambda start, stop: (0, min(length, -(-stop // block_size) * block_size)),
    )  # fmt: skip


def _delayed(hidden: Array, segment_ids: Array | None, before: Array | None, own: Any = None) -> Array:
    """[B, L, E] moved one position on; where a document starts, `own` (None: hidden itself)."""
    own = hidden if own is None else own
    moved = jnp.concatenate([own[:, :1] if before is None else before[:, None], hidden[:, :-1]], axis=1)
    if segment_ids is None:
        return moved
    same = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1) == segment_ids
    return jnp.where(same[..., None], moved, own)
