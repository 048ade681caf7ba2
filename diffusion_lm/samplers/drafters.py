"""Drafters: guesses at the next tokens, for `speculative` to verify; from the text itself, or a canvas."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.samplers.base import CachedDenoiser

Array = jax.Array


class Drafter(Protocol):
    """A frozen dataclass. Any draft is safe: a wrong one costs time, never text.

    num_tokens     tokens in a draft
    num_passes     forward passes that a draft costs
    canvas_length  how wide a canvas the verifying pass also predicts after each token, for the next draft; 0: none. The
                   next draft is then in the text, after what is written; masks, which are never accepted, where none is
    causal         how the masks are predicted: see `CachedDenoiser.draft_and_verify`
    sure           tokens of a draft that are always accepted
    """

    num_tokens: int
    num_passes: int = 0
    canvas_length: int = 0
    causal: bool = False
    sure: int = 0

    def __post_init__(self):
        if self.num_tokens < 1:
            raise ValueError(f"a draft must have at least 1 token; got {self.num_tokens}")

    def expected_tokens(self, acceptance: float) -> float:
        """What a draft and its verification yield if each token that isn't sure is accepted with this probability where
        all before it are (arXiv 2211.17192, equation 1)."""
        return 1 + self.sure + sum(acceptance**i for i in range(1, self.num_tokens - self.sure + 1))

    def __call__(self, network: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        """What may follow text[b, :filled[b]], of which the cache holds all but the last token: tokens int32
        [B, num_tokens], or logits float32 [B, num_tokens, V] of which the sampler draws them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    """What followed the last time that the text ended alike (prompt lookup decoding): free, and right where text
    repeats.

    max_ngram  how many tokens of the text's end are compared; the longest match counts, of equals the latest
    """

    num_tokens: int = 7
    max_ngram: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1 token; got {self.max_ngram}")

    def __call__(self, network: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        del network, cache
        return self.find(text, filled)[0]

    def find(self, text: Array, filled: Array) -> tuple[Array, Array]:
        """The drafts int32 [B, num_tokens], and how many tokens of each text's end match, int32 [B]."""
        return jax.vmap(self._find)(text, filled)

    def _find(self, text: Array, filled: Array) -> tuple[Array, Array]:
        at, match = jnp.arange(text.shape[0], dtype=jnp.int32), jnp.zeros(text.shape, jnp.int32)
        same = jnp.ones(text.shape, bool)
        for back in range(self.max_ngram):  # shifts, since a gather of all these tokens takes longer than a pass
            end = text[jnp.maximum(filled - 1 - back, 0)]
            same &= (jnp.pad(text, (back, 0), constant_values=-1)[: text.shape[0]] == end) & (filled > back)
            match += same
        best = jnp.argmax(jnp.where(at < filled - 1, match * text.shape[0] + at, -1))
        period = jnp.maximum(filled - 1 - best, 1)  # past the end, what followed is repeated
        draft = text[jnp.minimum(best + 1 + jnp.arange(self.num_tokens, dtype=jnp.int32) % period, filled - 1)]
        return draft, jnp.where(filled > 1, match[best], 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedDraft(Drafter):
    """One forward pass over a canvas of masks after the text: its likeliest tokens, all at once.

    mask  the mask id
    """

    mask: int
    num_tokens: int = 3
    num_passes = 1

    def __call__(self, network: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        last = jnp.take_along_axis(text, filled[:, None] - 1, axis=1)
        masks = jnp.full((text.shape[0], self.num_tokens), self.mask, jnp.int32)
        t = jnp.full(text.shape[0], self.num_tokens / (self.num_tokens + 1))
        logits = network.denoise_canvas(cache, jnp.concatenate([last, masks], axis=1), t)
        return jnp.argmax(logits[:, 1:], axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedDraft(Drafter):
    """One forward pass over the text's last token and the masks after it, as `objectives.drafting` trains them. The
    last token is clean: the first drafted token is drawn from the network's own prediction, so that it is accepted."""

    num_tokens: int = 5
    num_passes = 1
    causal = True
    sure = 1

    def __call__(self, network: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        last, none = jnp.take_along_axis(text, filled[:, None] - 1, axis=1), jnp.zeros_like(filled)
        head, drafts, _ = network.draft_and_verify(cache, last, none, self.num_tokens - 1, causal=True)
        return jnp.concatenate([head.logits(), drafts.logits()], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiDARDraft(Drafter):
    """A canvas of the pass that verified the previous draft (the idea is TiDAR's, arXiv 2511.08923). That pass predicts
    a canvas for each number of tokens that may be accepted; the one after the accepted tokens is the next draft. No
    pass only drafts, but each is wide: (1 + num_tokens) (2 + num_tokens) positions.

    A canvas begins where the verifying pass itself samples a token, which it doesn't know: it drafts from one position
    further on. Masks that predict the token after them (`causal`) stand for that token and all drafted ones but the
    last.
    """

    num_tokens: int = 2
    causal: bool = False

    @property
    def canvas_length(self) -> int:
        """The token that the verifying pass samples, and the draft."""
        return self.num_tokens if self.causal else 1 + self.num_tokens

    def __call__(self, network: CachedDenoiser, cache: Any, text: Array, filled: Array) -> Array:
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (self.num_tokens,)))(text, filled)
