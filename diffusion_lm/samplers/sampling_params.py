"""From logits to a token: temperature, top-k, top-p, min-p, and the tokens that nobody may write."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion_lm.categorical import categorical

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a token is drawn. Tokens as likely as the last one kept stay with it, whatever keeps it.

    temperature  0 takes the likeliest token
    top_k        keeps so many of the likeliest; 0 all
    top_p        keeps the smallest set of tokens with that much probability
    min_p        keeps tokens with at least this share of the likeliest one's probability (arXiv 2407.01082)
    suppressed   control pieces (unknown, begin of text) that are no text. Logits have no column for the mask
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    suppressed: tuple[int, ...] = ()

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 100:  # below, float32 logits would overflow
            raise ValueError(f"temperature must be 0 or between 1e-6 and 100, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1 (or 0: all), not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is a share, in [0, 1]; got {self.min_p}")

    def allowed(self, logits: Array) -> Array:
        """logits [..., V] with suppressed tokens at minus infinity: what confidence is measured on."""
        if not self.suppressed:
            return logits
        return logits.at[..., jnp.array(self.suppressed)].set(-jnp.inf)

    def sharpened(self, logits: Array) -> Array:
        """The logits that a draw is made from; float32 [..., V], in which softmax is the distribution drawn from."""
        logits = self.allowed(logits)
        if self.temperature == 0:
            best = jnp.argmax(logits, axis=-1, keepdims=True)
            index = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
            return jnp.where(index == best, 0.0, -jnp.inf)
        logits = logits / self.temperature
        if self.top_k:
            logits = _at_least(logits, jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][..., -1:])
        if self.min_p:
            logits = _at_least(logits, jnp.max(logits, axis=-1, keepdims=True) + math.log(self.min_p))
        return logits if self.top_p == 1 else _nucleus(logits, self.top_p)

    def __call__(self, keys: Array, logits: Array) -> tuple[Array, Array]:
        """keys [B], logits [B, ..., V] -> tokens int32 [B, ...], and the probability the model gave each."""
        logits = self.allowed(logits)
        if self.temperature == 0:
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            tokens = jax.vmap(categorical)(keys, self.sharpened(logits))
        picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return tokens, jnp.exp(picked - jax.nn.logsumexp(logits, axis=-1))


def _at_least(logits: Array, least: Array) -> Array:
    return jnp.where(logits >= least, logits, -jnp.inf)


def _nucleus(logits: Array, top_p: float) -> Array:
    """Minus infinity outside the nucleus (arXiv 1904.09751): the likeliest tokens until they hold top_p."""
    ordered = jnp.sort(jax.nn.softmax(logits, axis=-1), axis=-1, descending=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(jax.nn.softmax(logits, axis=-1) >= least, logits, -jnp.inf)
