"""From logits to a token: temperature, top-k, top-p, min-p, and suppressed tokens."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.categorical import coupled, from_uniforms, likeliest
from diffusion_lm.samplers.base import gather_tokens

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a token is sampled. Tokens as likely as the last one kept are kept, too.

    temperature  0 takes the likeliest token
    top_k        keeps so many of the likeliest; 0: all
    top_p        keeps the smallest set of tokens with that much probability (arXiv 1904.09751)
    min_p        keeps tokens with at least this share of the likeliest one's probability (arXiv 2407.01082)
    suppressed   ids that are never sampled, such as control tokens; those without a logit are ignored
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    suppressed: tuple[int, ...] = ()

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 100:  # below, float32 logits would overflow
            raise ValueError(f"temperature must be 0 or between 1e-6 and 100; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1 (or 0: all); got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is a share, in [0, 1]; got {self.min_p}")

    def allowed(self, logits: Array) -> Array:
        """logits [..., V] with suppressed tokens at minus infinity: what confidence is measured on."""
        return suppress(logits, self.suppressed)

    def sharpened(self, logits: Array) -> Array:
        """float32 logits [..., V] whose softmax is the distribution that tokens are sampled from."""
        if self.temperature == 0:
            logits = self.allowed(logits)
            index = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
            return jnp.where(index == likeliest(logits)[..., None], 0.0, -jnp.inf)
        return self.filtered(logits)

    def filtered(self, logits: Array) -> Array:
        """`sharpened`, but for temperature 0, which stays the network's own distribution among the tokens kept."""
        logits = self.allowed(logits)
        logits = logits if self.temperature == 0 else logits / self.temperature
        if self.top_k:
            logits = _at_least(logits, jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][..., -1:])
        if self.min_p:
            logits = _at_least(logits, jnp.max(logits, axis=-1, keepdims=True) + math.log(self.min_p))
        return logits if self.top_p == 1 else _nucleus(logits, self.top_p)

    def __call__(
        self, keys: Array, logits: Array, positions: Array | None = None, length: int = 0
    ) -> tuple[Array, Array]:
        """Samples a token at each position.

        Args:
          keys: [B].
          logits: [B, ..., V].
          positions: int32 [B, W], for logits [B, W, V] of some of `length` positions: each is sampled as it would be
            with all of them. None: logits are of all positions.
          length: see positions.

        Returns:
          tokens int32 [B, ...] (`categorical.INVALID` where no logit is finite), and the network's probability of each,
          whatever the temperature.
        """
        logits = self.allowed(logits)
        if self.temperature == 0:
            tokens = likeliest(logits)
        else:
            shape = logits.shape[1:-1] if positions is None else (length,)
            uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2, *shape)))(keys)
            if positions is not None:
                uniforms = jnp.take_along_axis(uniforms, jnp.minimum(positions, length - 1)[:, None], axis=2)
            tokens = jax.vmap(from_uniforms)(uniforms, self.sharpened(logits))
        return tokens, probability(logits, tokens)

    def next_token(self, keys: Array, logits: Array) -> tuple[Array, Array]:
        """A token from each row of logits [B, V] by its key [B], as text is written from left to right: see
        `categorical.coupled`. Tokens int32 [B], and the network's probability of each."""
        logits = self.allowed(logits)
        tokens = likeliest(logits) if self.temperature == 0 else jax.vmap(coupled)(keys, self.sharpened(logits))
        return tokens, probability(logits, tokens)


@struct.dataclass
class RowSampling:
    """As `SamplingParams`, with a temperature, top_p and min_p for each row, float32 [B]. They are arrays and no
    constants, so that rows with different values share a program.

    rest  top_k and suppressed, of all rows
    """

    temperature: Array
    top_p: Array
    min_p: Array
    rest: SamplingParams = struct.field(pytree_node=False)

    def allowed(self, logits: Array) -> Array:
        """See `SamplingParams.allowed`."""
        return self.rest.allowed(logits)

    def sharpened(self, logits: Array) -> Array:
        """See `SamplingParams.sharpened`; logits [B * n, ..., V], n rows of logits for each row."""
        logits = self.rest.allowed(logits)
        temperature, top_p, min_p = (
            jnp.repeat(a, logits.shape[0] // a.shape[0]).reshape(-1, *[1] * (logits.ndim - 1))
            for a in (self.temperature, self.top_p, self.min_p)
        )
        warm = dataclasses.replace(self.rest, temperature=1.0).sharpened(
            logits / jnp.where(temperature == 0, 1.0, temperature)
        )
        warm = _at_least(warm, jnp.max(warm, axis=-1, keepdims=True) + jnp.log(min_p))
        warm = jax.lax.cond(jnp.any(top_p < 1), lambda: jnp.where(top_p < 1, _nucleus(warm, top_p), warm), lambda: warm)
        return jnp.where(temperature == 0, dataclasses.replace(self.rest, temperature=0.0).sharpened(logits), warm)

    def __call__(
        self, keys: Array, logits: Array, positions: Array | None = None, length: int = 0
    ) -> tuple[Array, Array]:
        """See `SamplingParams.__call__`."""
        plain = dataclasses.replace(self.rest, temperature=1.0, top_k=0)
        tokens, _ = plain(keys, self.sharpened(logits), positions, length)
        return tokens, probability(self.allowed(logits), tokens)

    def next_token(self, keys: Array, logits: Array) -> tuple[Array, Array]:
        """See `SamplingParams.next_token`; logits [B * n, V], n rows of logits for each row."""
        tokens = jax.vmap(coupled)(keys, self.sharpened(logits))
        return tokens, probability(self.allowed(logits), tokens)


def probability(logits: Array, tokens: Array) -> Array:
    """softmax(logits [..., V]) of each token [...]."""
    return jnp.exp(gather_tokens(logits, tokens) - jax.nn.logsumexp(logits, axis=-1))


def sampling_of(part: Any) -> SamplingParams | None:
    """The first rule in a sampler, or in what it is made of; None if there is none."""
    if isinstance(part, SamplingParams):
        return part
    fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
    return next(filter(None, (sampling_of(getattr(part, field.name)) for field in fields)), None)


def with_sampling(part: Any, sampling: RowSampling | None) -> Any:
    """A sampler, or what is made of samplers, with another rule wherever it has one; None: as it is."""
    if sampling is None or not dataclasses.is_dataclass(part):
        return part
    inside = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    changed = {
        name: sampling if isinstance(value, SamplingParams) else with_sampling(value, sampling)
        for name, value in inside.items()
    }
    return dataclasses.replace(part, **{name: v for name, v in changed.items() if v is not inside[name]})


def suppress(logits: Array, ids: tuple[int, ...]) -> Array:
    """logits [..., V] with these ids at minus infinity; ids from V on have no logit."""
    ids = tuple(i for i in ids if i < logits.shape[-1])
    return logits.at[..., jnp.array(ids)].set(-jnp.inf) if ids else logits


def _at_least(logits: Array, least: Array) -> Array:
    return jnp.where(logits >= least, logits, -jnp.inf)


def _nucleus(logits: Array, top_p: float | Array) -> Array:
    """Minus infinity outside the nucleus: the likeliest tokens until they hold top_p.

    The least probability in it is found by bisection of the floats in [0, 1], whose bits are ordered as they are: that
    takes 30 sums over the vocabulary, where a CPU sorts it in ten times that.
    """
    p, shape = jax.nn.softmax(logits, axis=-1), (*logits.shape[:-1], 1)
    value = lambda bits: jax.lax.bitcast_convert_type(bits, p.dtype)  # noqa: E731

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(p > value(middle), p, 0.0), axis=-1, keepdims=True)
        return jnp.where(above < top_p, low, middle + 1), jnp.where(above < top_p, middle, high)

    one = jnp.float32(1.0).view(jnp.int32)
    bounds = jnp.zeros(shape, jnp.int32), jnp.broadcast_to(one.reshape(*[1] * len(shape)), shape)
    _, least = jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, bounds)
    return jnp.where(p >= value(least), logits, -jnp.inf)
