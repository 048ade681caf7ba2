"""Guesses at the next tokens, for `speculative` to check: from the text itself, or a canvas of the network."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import CachedDenoiser

Array = jax.Array


class Drafter(Protocol):
    """A frozen dataclass. Any guess is safe: what is wrong costs time, never text.

    width   tokens guessed at once
    passes  forward passes of the network that a guess takes
    masks   how wide a canvas the pass that checks a guess also reads behind each token, for the next guess; 0: none.
            That lies in the text then, behind what is written; where none was made there are masks, which never stand
    """

    width: int
    passes: int
    masks: int

    def __call__(self, model: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        """int32 [B, width]: what may follow text[b, :filled[b]], of which the cache has read all but the last token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """What followed the last time that the text ended so (prompt lookup): free, and right where text repeats itself.

    longest  how many tokens of the text's end are compared; the longest match counts, of equals the latest
    """

    width: int = 7
    longest: int = 8
    passes = masks = 0

    def __post_init__(self):
        check_width(self.width)
        if self.longest < 1:
            raise ValueError(f"longest must be at least 1 token, not {self.longest}")

    def __call__(self, model: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        del model, cache
        return jax.vmap(self._guess)(text, filled)

    def _guess(self, text: Array, filled: Array) -> Array:
        at, match = jnp.arange(text.shape[0], dtype=jnp.int32), jnp.zeros(text.shape, jnp.int32)
        same = jnp.ones(text.shape, bool)
        for back in range(self.longest):  # shifts, since a gather of all these tokens takes longer than a pass
            end = text[jnp.maximum(filled - 1 - back, 0)]
            same &= (jnp.pad(text, (back, 0), constant_values=-1)[: text.shape[0]] == end) & (filled > back)
            match += same
        best = jnp.argmax(jnp.where(at < filled - 1, match * text.shape[0] + at, -1))
        period = jnp.maximum(filled - 1 - best, 1)  # past the end, what followed goes round again
        return text[jnp.minimum(best + 1 + jnp.arange(self.width, dtype=jnp.int32) % period, filled - 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedDraft:
    """One pass of the network over a canvas of masks behind the text: its likeliest tokens, all at once.

    mask  the mask's id
    """

    mask: int
    width: int = 3
    passes = 1
    masks = 0

    def __post_init__(self):
        check_width(self.width)

    def __call__(self, model: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        last = jnp.take_along_axis(text, filled[:, None] - 1, axis=1)
        masks = jnp.full((text.shape[0], self.width), self.mask, jnp.int32)
        t = jnp.full(text.shape[0], self.width / (self.width + 1))
        logits = model.read_canvas(cache, jnp.concatenate([last, masks], axis=1), t)
        return jnp.argmax(logits[:, 1:], axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiDARDraft:
    """A canvas of the very pass that checked the guess before (the idea is TiDAR's, arXiv 2511.08923): it reads one for
    each way the check may end, and the one behind what stands is the next guess. No pass drafts only, and none is made
    for nothing, but each is a wide one: (1 + width) (2 + width) positions.

    A canvas begins where the check itself writes a token that it doesn't know, and so guesses one position further.
    """

    width: int = 2
    passes = 0

    def __post_init__(self):
        check_width(self.width)

    @property
    def masks(self) -> int:
        """The token that the check writes, and the guess."""
        return 1 + self.width

    def __call__(self, model: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (self.width,)))(text, filled)


def check_width(width: int) -> None:
    """Raises ValueError for a draft of no tokens."""
    if width < 1:
        raise ValueError(f"a draft must have at least 1 token, not {width}")
