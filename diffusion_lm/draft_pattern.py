"""The attention pattern of training drafts: masks behind many places of one clean text, in one pass."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import Alignment, AttentionPattern, KeyRange, Ranges

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: it holds an array
class Drafts(AttentionPattern):
    """[text ; drafts]: behind each anchor of a text, `draft_length` masks.

    The text attends causally. A draft attends to the text up to its anchor and causally to itself, so that its first
    positions are the same at every length. All logits predict the next token: as `DraftAndVerify(..., causal=True)`
    has it when sampling, but behind some positions of a text and not behind all.

    Args:
        anchors: int32 [B, A], positions of the row.
        draft_length: masks behind each.
    """

    anchors: Array
    draft_length: int

    @property
    def alignments(self) -> tuple[Alignment, ...]:
        return Alignment.NEXT, Alignment.NEXT

    @property
    def may_be_noisy(self) -> bool:
        return False

    def noisy(self, row: int) -> tuple[int, int]:
        return row - self._drafted, row

    @property
    def _drafted(self) -> int:
        return self.anchors.shape[1] * self.draft_length

    @property
    def granularity(self) -> int:
        return self.draft_length

    def places(self, length: int) -> Array:
        """int32 [B, A * draft_length]: where in a text of `length` positions each mask stands; `length` - 1 for those
        that would stand behind it."""
        steps = 1 + jnp.arange(self.draft_length, dtype=jnp.int32)
        places = (self.anchors[..., None] + steps[None, None]).reshape(self.anchors.shape[0], -1)
        return jnp.minimum(places, length - 1)

    def key_ranges(self, length: int, segment_ids: Array | None = None) -> Ranges:
        k, rows = self.draft_length, self.anchors.shape[0]
        text = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
        anchor = jnp.repeat(self.anchors, k, axis=1)
        inside = jnp.broadcast_to(jnp.arange(self._drafted, dtype=jnp.int32)[None], anchor.shape)
        own = None if segment_ids is None else jnp.take_along_axis(segment_ids, anchor, axis=1)
        queries = None if own is None else jnp.concatenate([segment_ids, own], axis=1)

        def key_range(first: list, last: list, index: list, keys: tuple[int, int], segments, window) -> KeyRange:
            first, last, index = (jnp.concatenate(parts, axis=1) for parts in (first, last, index))
            return KeyRange(first, last, index, queries, segments, window=window, keys=keys)

        of_text = key_range(
            [0 * text, 0 * anchor], [text, anchor], [text, anchor + 1 + inside % k], (0, length), segment_ids,
            lambda start, stop: (0, min(stop, length)),
        )  # fmt: skip
        of_drafts = key_range(
            [0 * text, inside // k * k], [0 * text - 1, inside], [0 * text, inside], (length, length + self._drafted),
            own, lambda start, stop: (max(start - length, 0) // k * k, max(stop - length, 0)),
        )  # fmt: skip
        return ((of_text, of_drafts),)

    def row_length(self, length: int) -> int:
        return length + self._drafted

    def repeat(self, a: Array) -> Array:
        return jnp.concatenate([a, jax.vmap(lambda row, at: row[at])(a, self.places(a.shape[1]))], axis=1)

    def split(self, row: Array) -> tuple[Array, ...]:
        return row[:, : row.shape[1] - self._drafted], row[:, row.shape[1] - self._drafted :]

    def previous(self, hidden: Array, segment_ids: Array | None, before: Array | None) -> Array:
        return hidden

    def num_pairs(self, length: int, window: int = 0) -> int:
        """With anchors in the middle of the text, in the mean."""
        k, seen = self.draft_length, min(length // 2, window or length)
        return length * (length + 1) // 2 + self._drafted * seen + self.anchors.shape[1] * k * (k + 1) // 2
