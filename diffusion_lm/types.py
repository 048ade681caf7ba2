"""The words of the house: shapes, and what the parts hand to one another.

Shape letters, used in every docstring:

    B  rows of a batch            V  pieces of the vocabulary (without the mask)
    L  positions of a row         E  width of the network
    K  positions of a canvas      H  heads (G of them key-value heads), D their width
    n  spans of L that share a time (n divides L)

Token ids 0..V-1 are the tokenizer's pieces; id V is the mask. No other id exists outside the embedding table.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Batch:
    """Packed rows of documents. A position is given, a target, or neither.

    tokens     int32 [B, L]  pieces; the mask id where there is no document
    segment_ids   int32 [B, L]  the document's number in its row, from 1; 0 where there is none
    positions  int32 [B, L]  0, 1, ... from the document's (or the row's) first position
    given      bool  [B, L]  context: never noised, never scored (begin of text, a row's first token, a prompt)
    target     bool  [B, L]  scored and counted, and noised by a process

    A document's positions that are neither repeat its end of text up to its canvas's end. A process noises them and a
    bound scores them as it does targets, but no weight counts them: left as masks, or unscored, a revealed token
    would tell for free that the text goes on, and the "bound" would be none.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    context_mask: Array
    loss_mask: Array


@struct.dataclass
class Loss:
    """A loss as a sum and a weight, both float32 []: adding Losses is exact under accumulation and sharding.

    penalty  what training minimises beside it: a sum, too, but no nats of any text; None where there is none
    """

    sum: Array
    weight: Array
    aux_loss: Array | None = None

    def __add__(self, other: "Loss") -> "Loss":
        return jax.tree.map(lambda a, b: a + b, self, other)

    @property
    def mean(self) -> Array:
        """Nats per unit of weight (a target token, for every objective here)."""
        return self.sum / jnp.maximum(self.weight, 1.0)


class Alignment(enum.Enum):
    """Which token the logits at position i speak of."""

    SAME = "same"  # the token at i
    NEXT = "next"  # the token at i + 1


class Causal(NamedTuple):
    """Each position sees itself and what is before it; its logits speak of the next token."""


class Full(NamedTuple):
    """Chain position sees its whole document; logits speak of the same position."""


class BlockCausal(NamedTuple):
    """Each position sees its own block of `block` positions and all blocks before it."""

    block_size: int


class BlockDiffusionTraining(NamedTuple):
    """[noisy ; clean], each L wide, read in one pass (BD3-LM, arXiv 2503.09573, section 3).

    A noisy block sees itself both ways and the clean blocks before it. The clean half reads itself as `clean` says.
    Logits of the noisy half speak of the same position; those of the clean half, read causally, of the next.
    """

    block_size: int
    clean: Causal | BlockCausal


class DraftAndVerify(NamedTuple):
    """[text ; canvases]: `text` positions, and a canvas of `canvas` positions behind each of them, for every place at
    which the text may turn out to end, in one pass behind a cache (the idea is TiDAR's, arXiv 2511.08923).

    The text reads itself causally, its logits speak of the next token. Canvas i sees text 0..i, and itself both ways;
    its logits speak of the same position. All see the cache.
    """

    text: int
    canvas: int


AttentionPattern = Causal | Full | BlockCausal | BlockDiffusionTraining | DraftAndVerify


class LogitsHead(Protocol):
    """What a network says of each position, before anybody asks for [.., V] numbers at once.

    penalty  float32 []: what training is to minimise beside, per unit of a loss's weight; or None
    """

    alignment: Alignment
    aux_loss: Array | None

    def logits(self) -> Array:
        """float32 [B, L, V]."""

    def gather(self, index: Array) -> "LogitsHead":
        """The readout of some positions of each row: index int32 [B, n] -> [B, n]."""

    def total(
        self,
        nats: Callable[..., Array],
        weights: Array,
        *arguments: Array,
        shared: tuple[Array, ...] = (),
        teacher: "LogitsHead | None" = None,
    ) -> Array:
        """sum of weights * nats(logits, *arguments, *shared), float32 [], in memory that doesn't grow with L x V.

        weights float32 [B, L]; arguments [B, L, ...]; shared: what all positions have in common. `nats` is called with
        parts of them: logits [B, c, W] with W >= V, minus infinity from V on, behind them a teacher's of the same
        positions if there is one, arguments [B, c, ...] and all of shared -> [B, c]. Its gradient must be finite at
        those minus infinities; it reaches the network, weights and shared, but neither arguments nor a teacher.
        """

    def cross_entropy(self, targets: Array, weights: Array) -> Array:
        """sum of weights * -log softmax(logits)[targets]; targets int32 [B, L] in 0..V-1 where weights is not 0."""

    def map_positions(self, ask: Callable[..., Array], *arguments: Array) -> Array:
        """ask(logits [B, c, V], *arguments [B, c, ...]) -> [B, c, ...], asked of parts of the positions and joined to
        [B, L, ...], in memory that doesn't grow with L x V; without gradient."""

    def where(self, here: Array, other: "LogitsHead") -> "LogitsHead":
        """This readout where `here`, bool [B, L]; elsewhere another one of the same network."""

    @property
    def vectors(self) -> Array:
        """float32 [W, E], W >= V: what the network reads in a piece's place, each of size sqrt(E). Only of a network
        that is fed vectors (see `Denoise`)."""

    def expected_embedding(self) -> Array:
        """softmax(logits) @ vectors, float32 [B, L, E], in memory that doesn't grow with L x V; without gradient."""


def loss_of(head: LogitsHead, total: Array, weight: Array) -> Loss:
    """The total of what a readout says, with its penalty."""
    return Loss(sum=total, weight=weight, aux_loss=None if head.aux_loss is None else head.aux_loss * weight)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """-log softmax(logits)[targets]: [..., W] and [...] -> [...]. (A sum picks the target: a gather's gradient, a
    scatter, is slow on CPU and TPU.)"""
    picked = jnp.sum(jnp.where(one_hot(logits, targets), logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def one_hot(logits: Array, tokens: Array) -> Array:
    """bool [..., W]: where each position's token stands among its logits."""
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32).reshape((1,) * tokens.ndim + (-1,))
    return index == tokens[..., None]


class NoisyEmbeddings(NamedTuple):
    """What a network is fed in place of tokens' vectors: z = keep x the token's vector + more, float32 [B, L, E].

    keep  float32 [B, L]
    more  float32 [B, L, E]
    told  float32 [B, L]: what z says by itself. A piece is as likely as told x z . its vector, up to a constant (all
          vectors are of one size); a network adds that to its logits, and learns the rest. 0 where nothing is asked
    """

    keep: Array
    more: Array
    told: Array


class Denoise(Protocol):
    """All that an objective sees of a network.

    tokens [B, L] and t float32 [B, n] (n spans of L / n positions share a time; 0 is clean) are read as `reading`
    says, inside the documents that `segment_ids` separates. The readouts: one, (noisy, clean) for BlockDiffusionTraining, or
    (text, canvases) for DraftAndVerify.

    Some networks can be fed vectors, too:
    soft   float32 [B, L, E]: a prediction of the same tokens, as `LogitsHead.expected_embedding` has it. None: zeros
    mixed  what stands in place of the tokens' vectors
    """

    def __call__(
        self,
        tokens: Array,
        t: Array,
        *,
        attention: AttentionPattern,
        positions: Array,
        segment_ids: Array,
        self_cond: Array | None = None,
        mixed: NoisyEmbeddings | None = None,
    ) -> Any: ...


@struct.dataclass
class DenseLogits:
    """The plain Readout: logits float32 [B, L, V] that somebody already has (an oracle, a test, a small model)."""

    values: Array
    alignment: Alignment = struct.field(pytree_node=False, default=Alignment.SAME)
    vectors: Array | None = None
    aux_loss: Array | None = None

    def logits(self) -> Array:
        return self.values

    def gather(self, index: Array) -> "DenseLogits":
        return self.replace(values=jnp.take_along_axis(self.values, index[..., None], axis=1))

    def total(self, nats: Callable[..., Array], weights: Array, *arguments: Array, shared=(), teacher=None) -> Array:
        said = () if teacher is None else (jax.lax.stop_gradient(teacher.logits()),)
        arguments = jax.lax.stop_gradient(arguments)
        return jnp.sum(jnp.where(weights != 0, weights * nats(self.values, *said, *arguments, *shared), 0.0))

    def cross_entropy(self, targets: Array, weights: Array) -> Array:
        return self.total(cross_entropy, weights, targets)

    def map_positions(self, ask: Callable[..., Array], *arguments: Array) -> Array:
        return jax.lax.stop_gradient(ask(self.values, *arguments))

    def where(self, here: Array, other: LogitsHead) -> "DenseLogits":
        return self.replace(values=jnp.where(here[..., None], self.values, other.logits()))

    def expected_embedding(self) -> Array:
        vectors = self.vectors[: self.values.shape[-1]]
        shares, highest = jax.nn.softmax(self.values, axis=-1), jax.lax.Precision.HIGHEST
        return jax.lax.stop_gradient(jnp.einsum("blv,ve->ble", shares, vectors, precision=highest))
