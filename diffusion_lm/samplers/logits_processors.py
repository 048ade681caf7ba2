"""Logits processors: rules on the network's logits, given the text so far. `ProcessedDenoiser` applies them."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
_PENALTY = 1e4  # nats: never sampled, unless everything is penalised


class LogitsProcessor(Protocol):
    """A frozen dataclass, or a function: it must be hashable, since programs are compiled for it."""

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        """Changes the logits of one position.

        Args:
          logits: float32 [V], of column `at`.
          text: int32 [S]. Unknown tokens have the id V (whatever the mask's id): all from `at` on under causal
            attention, and the masks of a canvas. Noise that isn't masks looks like text.
          at: int32 [].

        Returns:
          float32 [V]. At least one token must stay possible.
        """


@dataclasses.dataclass(frozen=True)
class Chain:
    """All of these, in order."""

    processors: tuple[LogitsProcessor, ...]

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        for processor in self.processors:
            logits = processor(logits, text, at)
        return logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuppressTokens:
    """Tokens that are never sampled."""

    tokens: tuple[int, ...]

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        del text, at
        return logits.at[jnp.array(self.tokens, jnp.int32)].set(-jnp.inf) if self.tokens else logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionPenalty:
    """Divides the logits of tokens that occur in the text by `penalty` where they are above 0, else multiplies them
    with it (CTRL, arXiv 1909.05858, section 4.1; the prompt counts, as in Hugging Face's code).

    Logits are taken as the network gives them, so that the effect depends on what all of them have in common: see
    `FrequencyPenalty`. Tokens of one step don't count one another.
    """

    penalty: float

    def __post_init__(self):
        if not self.penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0 (1: none); got {self.penalty}")

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        del at
        seen = jnp.zeros(logits.shape[0] + 1, bool).at[text].set(True)[:-1]
        return jnp.where(seen, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyPenalty:
    """Subtracts `nats` from a token's logit for each time it occurs within `window` columns (0: anywhere).

    (A share of the logit, as in arXiv 1909.05858, section 4.1, would depend on what all logits have in common.) Tokens
    of one step don't count one another.
    """

    nats: float
    window: int = 0

    def __post_init__(self):
        if not 0 < self.nats <= 100:
            raise ValueError(f"a frequency penalty must be above 0 and at most 100 nats; got {self.nats}")
        if self.window < 0:
            raise ValueError(f"window must be at least 1 column (or 0: all); got {self.window}")

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        near = jnp.ones(text.shape, jnp.float32)
        if self.window:
            distance = jnp.abs(jnp.arange(text.shape[0], dtype=jnp.int32) - at)
            near = ((distance > 0) & (distance <= self.window)).astype(jnp.float32)
        count = jnp.zeros(logits.shape[0] + 1).at[text].add(near)
        return logits - self.nats * count[:-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoRepeatNGram:
    """No n-gram of `size` tokens twice, where another token is possible. Tokens of one step don't count one another."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"an n-gram has at least 1 token; got {self.size}")

    def __call__(self, logits: Array, text: Array, at: Array) -> Array:
        vocab, columns = logits.shape[0], jnp.arange(text.shape[0], dtype=jnp.int32)

        def token(column: Array) -> Array:  # `vocab` outside the text
            inside = (column >= 0) & (column < text.shape[0])
            return jnp.where(inside, text[jnp.clip(column, 0, text.shape[0] - 1)], vocab)

        repeats = jnp.zeros(vocab + 1, bool)
        for before in range(self.size):  # `at` is the n-gram's token number `before`
            same = columns != at
            for i in range(-before, self.size - before):
                if i:
                    here = token(at + i)
                    same &= (here != vocab) & (token(columns + i) == here)
            repeats = repeats.at[text].max(same)
        return logits - _PENALTY * repeats[:-1]
