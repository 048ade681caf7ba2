"""Classifier-free guidance: what the prompt makes likelier is made likelier still."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import AttentionPattern
from diffusion_lm.types import Alignment, LogitsHead

Array = jax.Array


@struct.dataclass
class GuidedCache:
    """One cache for 2 B rows: as they are, then without their prompts."""

    inner: Any

    @property
    def length(self) -> Array:
        return self.inner.length[: self.inner.length.shape[0] // 2]


@struct.dataclass
class ClassifierFreeGuidance:
    """A `samplers.base.Model` that says (1 + scale) log p(x | prompt, text) - scale log p(x | text), up to a constant
    (arXiv 2207.12598, equation 6; for discrete diffusion arXiv 2412.10193). A pass reads twice the rows.

    Without its prompt a text goes on from its first token (begin of text) alone; a model that reads no text into a
    cache, but a canvas with the prompt in it, sees masks there (LLaDA's way, arXiv 2502.09992). Over an approximate
    cache each half sees its own keys and values.

    scale   float32 []: 0 leaves the network as it is
    prompt  int32 [B]: the prompts' lengths
    mask    the id V
    """

    model: Any
    scale: Array
    prompt: Array
    mask: int = struct.field(pytree_node=False)

    def empty_cache(self, rows: int, slots: int) -> GuidedCache:
        """The network's own, for twice the rows."""
        return GuidedCache(inner=self.model.empty_cache(2 * rows, slots))

    def extend(
        self, cache: GuidedCache, tokens: Array, count: Array, attention: AttentionPattern
    ) -> tuple[LogitsHead, GuidedCache]:
        """The first call reads the prompts: without them, only the first token."""
        alone = jnp.where(cache.length == 0, jnp.minimum(count, 1), count)
        head, inner = self.model.extend(cache.inner, _twice(tokens), jnp.concatenate([count, alone]), attention)
        # what is said behind the prompt is said, without it, behind the first token
        behind = jnp.where(cache.length == 0, count - alone, 0)
        return _Head(inner=head, scale=self.scale, behind=behind), GuidedCache(inner=inner)

    def fork(
        self, cache: GuidedCache, tokens: Array, count: Array, masks: int
    ) -> tuple[LogitsHead, LogitsHead, GuidedCache]:
        """Behind prompts that have been read."""
        said, ahead, inner = self.model.fork(cache.inner, _twice(tokens), _twice(count), masks)
        one, other = (_Head(inner=r, scale=self.scale, behind=jnp.zeros_like(count)) for r in (said, ahead))
        return one, other, GuidedCache(inner=inner)

    def truncate(self, cache: GuidedCache, count: Array) -> GuidedCache:
        return GuidedCache(inner=self.model.truncate(cache.inner, _twice(count)))

    def resize(self, cache: GuidedCache, rows: Array, slots: int | None = None) -> GuidedCache:
        both = jnp.concatenate([rows, rows + cache.length.shape[0]])
        return GuidedCache(inner=self.model.resize(cache.inner, both, slots))

    def read_canvas(self, cache: GuidedCache, canvas: Array, t: Array, **vectors) -> Array:
        """ValueError for vectors beside a canvas that holds its prompt: they would tell what is masked."""
        both = _twice(canvas)
        if cache.inner.slots == 0:
            if vectors:
                raise ValueError("guidance of a network that is fed vectors needs its prompt in a cache: leave it out")
            both = self._and_without(canvas, jnp.arange(canvas.shape[1], dtype=jnp.int32)[None])
        said = self.model.read_canvas(cache.inner, both, _twice(t), **jax.tree.map(_twice, vectors))
        return _guided(said, self.scale)

    def forward_positions(self, cache: GuidedCache, tokens: Array, at: Array, t: Array) -> tuple[Array, GuidedCache]:
        """See `approximate.PartialForward`."""
        said, inner = self.model.forward_positions(cache.inner, self._and_without(tokens, at), _twice(at), _twice(t))
        return _guided(said, self.scale), GuidedCache(inner=inner)

    def expected_embedding(self, logits: Array) -> Array:
        return self.model.expected_embedding(logits)

    def _and_without(self, tokens: Array, at: Array) -> Array:
        """Tokens [B, W] that stand at `at`, and once more with the prompt masked but for its first token: [2 B, W]."""
        of_prompt = (at > 0) & (at < self.prompt[:, None])
        return jnp.concatenate([tokens, jnp.where(of_prompt, self.mask, tokens)])


@struct.dataclass
class _Head:
    """The readout of 2 B rows as that of B guided ones. `behind` [B]: so many positions earlier the second half's
    prompt ended."""

    inner: Any
    scale: Array
    behind: Array

    @property
    def alignment(self) -> Alignment:
        return self.inner.alignment

    def gather(self, index: Array) -> "_Head":
        both = jnp.concatenate([index, index - self.behind[:, None]])
        return self.replace(inner=self.inner.gather(both), behind=jnp.zeros_like(self.behind))

    def logits(self) -> Array:
        return _guided(self.inner.logits(), self.scale)


def _twice(a: Array) -> Array:
    return jnp.concatenate([a, a])


def _guided(said: Array, scale: Array) -> Array:
    """[2 B, K, V] -> [B, K, V]. Normalised first, so that scales mix probabilities and not arbitrary offsets."""
    fixed, without = jnp.split(jax.nn.log_softmax(said, axis=-1), 2)
    return fixed + scale * (fixed - without)
