"""A network with logits processors and classifier-free guidance: every sampler's logits pass through here."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import AttentionPattern
from diffusion_lm.samplers.logits_processors import LogitsProcessor
from diffusion_lm.types import Alignment, LogitsHead

Array = jax.Array


@struct.dataclass
class ProcessedCache:
    """The network's cache (of 2 B rows under guidance: with their prompts, then without), the text that it holds, int32
    [B, S] (None without a processor), and its length int32 [B]; 0 if the cache is approximate."""

    inner: Any
    text: Array | None
    length: Array


@struct.dataclass
class ProcessedDenoiser:
    """A `CachedDenoiser` whose logits are guided, then processed.

    Guidance: (1 + s) log p(x | prompt, text) - s log p(x | text), up to a constant (arXiv 2207.12598, equation 6; for
    discrete diffusion arXiv 2412.10193). A forward pass then has twice the rows. Without its prompt a text continues
    from its first token (begin of text) alone; where the prompt is in the canvas, it is masked there, begin of text
    included (as in LLaDA, arXiv 2502.09992). Over an approximate cache each half has its own keys and values.

    network        the `CachedDenoiser`
    mask           the mask id
    processor      None: no processor
    cfg_scale      s, float32 []; None: no guidance
    prompt_length  int32 [B], with guidance
    """

    network: Any
    mask: int = struct.field(pytree_node=False)
    processor: LogitsProcessor | None = struct.field(pytree_node=False, default=None)
    cfg_scale: Array | None = None
    prompt_length: Array | None = None

    def empty_cache(self, rows: int, slots: int) -> ProcessedCache:
        """An empty cache of the network, for twice the rows under guidance."""
        text = None if self.processor is None else jnp.full((rows, slots), self.mask, jnp.int32)
        inner = self.network.empty_cache(rows if self.cfg_scale is None else 2 * rows, slots)
        return ProcessedCache(inner=inner, text=text, length=jnp.zeros(rows, jnp.int32))

    def extend(
        self, cache: ProcessedCache, tokens: Array, count: Array, attention: AttentionPattern
    ) -> tuple[LogitsHead, ProcessedCache]:
        """The first call has the prompts; without its prompt, a row has its first token only."""
        without = jnp.where(cache.length == 0, jnp.minimum(count, 1), count)
        head, inner = self.network.extend(cache.inner, self.twice(tokens), self.twice(count, without), attention)
        text, at = self._text_with(cache, tokens)
        head = _Head(inner=head, denoiser=self, lag=count - without, text=text, at=at + 1, end=at + 1)
        return head, ProcessedCache(inner=inner, text=text, length=cache.length + count)

    def draft_and_verify(
        self, cache: ProcessedCache, tokens: Array, count: Array, masks: int, causal: bool = False
    ) -> tuple[LogitsHead, LogitsHead, ProcessedCache]:
        """After prompts that are in the cache. A processor sees masks in the canvas after each token."""
        head, drafts, inner = self.network.draft_and_verify(
            cache.inner, self.twice(tokens), self.twice(count), masks, causal
        )
        text, at = self._text_with(cache, tokens)
        end = jnp.repeat(at + 1, masks, axis=1)
        columns = end + causal + jnp.tile(jnp.arange(masks, dtype=jnp.int32), at.shape[1])[None]
        common = {"denoiser": self, "lag": jnp.zeros_like(count), "text": text}
        head = _Head(inner=head, at=at + 1, end=at + 1, **common)
        drafts = _Head(inner=drafts, at=columns, end=end, **common)
        return head, drafts, ProcessedCache(inner=inner, text=text, length=cache.length + count)

    def truncate(self, cache: ProcessedCache, count: Array) -> ProcessedCache:
        inner = self.network.truncate(cache.inner, self.twice(count))
        return cache.replace(inner=inner, length=cache.length - count)

    def resize(self, cache: ProcessedCache, rows: Array, slots: int | None = None) -> ProcessedCache:
        text = cache.text
        if text is not None:
            more = ((0, 0), (0, 0 if slots is None else slots - text.shape[1]))
            text = jnp.pad(jnp.take(text, rows, axis=0), more, constant_values=self.mask)
        inner = self.network.resize(cache.inner, self.twice(rows, rows + cache.length.shape[0]), slots)
        return ProcessedCache(inner=inner, text=text, length=jnp.take(cache.length, rows))

    def denoise_canvas(self, cache: ProcessedCache, canvas: Array, t: Array, **inputs) -> Array:
        """ValueError for guidance with inputs beside a canvas that holds its prompt: they would show what is masked."""
        tokens = self.twice(canvas)
        if self.cfg_scale is not None and cache.inner.slots == 0:
            if inputs.keys() - {"segment_ids"}:
                raise ValueError("guidance of a self-conditioned network needs its prompt in a cache: set cfg_scale=0")
            tokens = self._without_prompt(canvas, jnp.arange(canvas.shape[1], dtype=jnp.int32)[None])
        logits = self.network.denoise_canvas(cache.inner, tokens, self.twice(t), **jax.tree.map(self.twice, inputs))
        return self.process(self.guide(logits), *self._text_with(cache, canvas))

    def forward_positions(
        self, cache: ProcessedCache, tokens: Array, at: Array, t: Array
    ) -> tuple[Array, ProcessedCache]:
        """See `approximate_cache.PartialForward`. A processor sees these tokens, and others as they were last
        computed."""
        both = tokens if self.cfg_scale is None else self._without_prompt(tokens, at)
        logits, inner = self.network.forward_positions(cache.inner, both, self.twice(at), self.twice(t))
        logits, text = self.guide(logits), cache.text
        if text is not None:
            text = _scatter(text, at, tokens)
            # logits at no position mean nothing, but a processor takes columns of the text only
            logits = self.process(logits, text, jnp.minimum(at, text.shape[1] - 1))
        return logits, cache.replace(inner=inner, text=text)

    def expected_embedding(self, logits: Array) -> Array:
        return self.network.expected_embedding(logits)

    def twice(self, a: Array, without: Array | None = None) -> Array:
        """The rows [B, ...] with their prompts and `without` (None: the same); as they are if there is no guidance."""
        return a if self.cfg_scale is None else jnp.concatenate([a, a if without is None else without])

    def guide(self, logits: Array) -> Array:
        """[2 B, K, V] -> [B, K, V]. Normalised first, so that scales mix probabilities and not arbitrary offsets."""
        if self.cfg_scale is None:
            return logits
        conditional, unconditional = jnp.split(jax.nn.log_softmax(logits, axis=-1), 2)
        return conditional + self.cfg_scale * (conditional - unconditional)

    def process(self, logits: Array, text: Array | None, at: Array, end: Array | None = None) -> Array:
        """Logits [B, T, V] of columns `at` [B, T] of the text [B, S], of which [B, T] columns `end` are known (None:
        all)."""
        if self.processor is None:
            return logits
        vocab, columns = logits.shape[-1], jnp.arange(text.shape[1], dtype=jnp.int32)
        text = text if self.mask == vocab else jnp.where(text == self.mask, vocab, text)

        def one(logits: Array, text: Array, at: Array, end: Array) -> Array:
            return self.processor(logits, jnp.where(columns < end, text, vocab), at)

        end = jnp.full_like(at, text.shape[1]) if end is None else end
        return jax.vmap(jax.vmap(one, (0, None, 0, 0)))(logits, text, at, end)

    def _without_prompt(self, tokens: Array, at: Array) -> Array:
        """Tokens [B, W] at positions `at`, then the same with the prompt masked: [2 B, W]."""
        return jnp.concatenate([tokens, jnp.where(at < self.prompt_length[:, None], self.mask, tokens)])

    def _text_with(self, cache: ProcessedCache, tokens: Array) -> tuple[Array | None, Array]:
        """The text [B, S] with [B, T] more tokens, and their columns [B, T]. (A network without a cache has S = 0:
        there the canvas is all of the text.)"""
        at = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        if cache.text is None or not cache.text.shape[1]:
            return (None if cache.text is None else tokens), at
        known = jnp.arange(cache.text.shape[1], dtype=jnp.int32)[None] < cache.length[:, None]
        return _scatter(jnp.where(known, cache.text, self.mask), at, tokens), at


@struct.dataclass
class _Head:
    """The head of a `ProcessedDenoiser`: logits of columns `at` [B, T]; the text is known up to column `end` [B, T].
    Rows without their prompt are `lag` [B] positions behind."""

    inner: Any
    denoiser: ProcessedDenoiser
    lag: Array
    text: Array | None
    at: Array
    end: Array

    @property
    def alignment(self) -> Alignment:
        return self.inner.alignment

    def gather(self, index: Array) -> "_Head":
        at, end = (jnp.take_along_axis(a, index, axis=1) for a in (self.at, self.end))
        inner = self.inner.gather(self.denoiser.twice(index, index - self.lag[:, None]))
        return self.replace(inner=inner, lag=jnp.zeros_like(self.lag), at=at, end=end)

    def logits(self) -> Array:
        return self.denoiser.process(self.denoiser.guide(self.inner.logits()), self.text, self.at, self.end)


def _scatter(text: Array, at: Array, tokens: Array) -> Array:
    """text [B, S] with tokens [B, T] at columns `at`; S is no column."""
    return jax.vmap(lambda row, i, new: row.at[i].set(new, mode="drop"))(text, at, tokens)
