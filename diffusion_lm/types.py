"""Shapes, and the types that the parts of the library hand to one another.

Shape letters, used in every docstring:

    B  rows of a batch            V  ids that have logits (`models.base.Vocabulary.size`)
    L  positions of a row         E  width of the network
    K  positions of a canvas      H  attention heads (G of them key-value heads), D their width
    n  spans of L that share a time (n divides L)
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import Alignment, AttentionPattern

Array = jax.Array


@struct.dataclass
class Batch:
    """Packed rows of documents. Each position is context, or a target, or neither.

    Args:
        tokens: int32 [B, L]; the mask id where there is no document.
        segment_ids: int32 [B, L], the document's number in its row, from 1; 0 where there is none.
        positions: int32 [B, L], 0, 1, ... from the document's (or the row's) first position.
        context_mask: bool [B, L], context: never noised or scored (begin of text, a row's first token, a prompt).
        loss_mask: bool [B, L], targets: noised by a process, scored and counted.

    Positions of a document that are neither repeat its end of text up to the end of its canvas. A process noises them
    and an ELBO scores them as it does targets, but the loss's weight doesn't count them. If they stayed masked or
    unscored, a revealed token would show that the text goes on, and the bound would not hold.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    context_mask: Array
    loss_mask: Array


@struct.dataclass
class Loss:
    """A loss as a sum and a weight, both float32 []: adding Losses is exact under accumulation and sharding.

    Args:
        sum: nats over all positions.
        weight: how many target tokens they are spread over.
        aux_loss: a sum that training minimises as well, not nats of any text; None where there is none.
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


class LogitsHead(Protocol):
    """The network's predictions at each position, before the [..., V] logits are computed.

    Args:
        alignment: which token the logits at a position predict.
        aux_loss: float32 [], what training minimises as well, per unit of a loss's weight; or None.
    """

    alignment: Alignment
    aux_loss: Array | None

    def logits(self) -> Array:
        """float32 [B, L, V]."""

    def gather(self, index: Array) -> "LogitsHead":
        """The predictions at some positions of each row: index int32 [B, n] -> [B, n]."""

    def weighted_loss(
        self,
        loss: Callable[..., Array],
        weights: Array,
        *arguments: Array,
        shared: tuple[Array, ...] = (),
        teacher: "LogitsHead | None" = None,
    ) -> Array:
        """The sum of weights * loss(logits, *arguments, *shared), in memory that doesn't grow with L x V.

        The gradient reaches the network, weights and shared, but neither arguments nor the teacher.

        Args:
            loss: called with some of the positions, [b, c], in whatever order: logits [b, c, W] with W >= V (minus
                infinity where an id can't be predicted and from V on), then a teacher's logits of the same positions if
                there is one, arguments [b, c, ...] and all of shared. Returns [b, c]. Its gradient must be finite at
                those minus infinities.
            weights: float32 [B, L].
            arguments: [B, L, ...].
            shared: arrays that all positions share.
            teacher: the predictions of another network at the same positions.

        Returns:
            float32 [].
        """

    def cross_entropy(self, targets: Array, weights: Array) -> Array:
        """sum of weights * -log softmax(logits)[targets]; targets int32 [B, L] in 0..V-1 where weights is not 0."""

    def map_positions(self, function: Callable[..., Array], *arguments: Array) -> Array:
        """function(logits [b, c, V], *arguments [b, c, ...]) -> [b, c, ...], applied to some of the positions at a time
        and joined to [B, L, ...], in memory that doesn't grow with L x V; without gradient."""

    def select(self, here: Array, other: "LogitsHead") -> "LogitsHead":
        """These predictions where `here`, bool [B, L]; elsewhere those of another head of the same network."""

    @property
    def embeddings(self) -> Array:
        """float32 [W, E], W >= V: each token's input embedding, of norm sqrt(E). Only of a network that takes
        embeddings as inputs (see `Denoise`)."""

    def expected_embedding(self) -> Array:
        """softmax(logits) @ embeddings, float32 [B, L, E], in memory that doesn't grow with L x V; without gradient."""


def loss_of(head: LogitsHead, total: Array, weight: Array) -> Loss:
    """A Loss of this total, with the head's auxiliary loss."""
    return Loss(sum=total, weight=weight, aux_loss=None if head.aux_loss is None else head.aux_loss * weight)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """-log softmax(logits)[targets]: [..., W] and [...] -> [...]."""
    # A sum selects the target: the gradient of a gather, a scatter, is slow on CPU and TPU.
    picked = jnp.sum(jnp.where(one_hot(logits, targets), logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def one_hot(logits: Array, tokens: Array) -> Array:
    """bool [..., W]: True at each position's token."""
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32).reshape((1,) * tokens.ndim + (-1,))
    return index == tokens[..., None]


class NoisyEmbeddings(NamedTuple):
    """Network inputs in place of the tokens' embeddings: z = signal_scale * embedding(token) + noise.

    Args:
        signal_scale: float32 [B, L].
        noise: float32 [B, L, E].
        logit_scale: float32 [B, L]; the network adds logit_scale * z . embedding(v) to the logit of each token v.
            That is z's own log-likelihood of v up to a constant, as all embeddings have one norm. 0 where nothing is
            predicted.
    """

    signal_scale: Array
    noise: Array
    logit_scale: Array


class Denoise(Protocol):
    """All that an objective sees of a network.

    Args:
        tokens: int32, the parts of the attention pattern's row, joined.
        t: float32 [B, n], time (0 is clean); n spans of equally many positions share one.
        attention: the pattern.
        positions, segment_ids: int32 [B, L], of the text; documents don't attend to one another.
        self_cond: float32 [B, L, E], a prediction for the same tokens, as `LogitsHead.expected_embedding` computes it.
            None: zeros.
        embeddings: inputs in place of the tokens' embeddings.

    Returns:
        A LogitsHead, or a tuple with one for each part of the pattern's row.
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
        embeddings: NoisyEmbeddings | None = None,
    ) -> Any: ...


@struct.dataclass
class DenseLogits:
    """A LogitsHead of logits float32 [B, L, V] that exist already (an oracle, a test, a small model)."""

    values: Array
    alignment: Alignment = struct.field(pytree_node=False, default=Alignment.SAME)
    embeddings: Array | None = None
    aux_loss: Array | None = None

    def logits(self) -> Array:
        return self.values

    def gather(self, index: Array) -> "DenseLogits":
        return self.replace(values=jnp.take_along_axis(self.values, index[..., None], axis=1))

    def weighted_loss(self, loss: Callable[..., Array], weights: Array, *arguments: Array, shared=(), teacher=None):
        taught = () if teacher is None else (jax.lax.stop_gradient(teacher.logits()),)
        arguments = jax.lax.stop_gradient(arguments)
        return jnp.sum(jnp.where(weights != 0, weights * loss(self.values, *taught, *arguments, *shared), 0.0))

    def cross_entropy(self, targets: Array, weights: Array) -> Array:
        return self.weighted_loss(cross_entropy, weights, targets)

    def map_positions(self, function: Callable[..., Array], *arguments: Array) -> Array:
        return jax.lax.stop_gradient(function(self.values, *arguments))

    def select(self, here: Array, other: LogitsHead) -> "DenseLogits":
        return self.replace(values=jnp.where(here[..., None], self.values, other.logits()))

    def expected_embedding(self) -> Array:
        embeddings = self.embeddings[: self.values.shape[-1]]
        probabilities, highest = jax.nn.softmax(self.values, axis=-1), jax.lax.Precision.HIGHEST
        return jax.lax.stop_gradient(jnp.einsum("blv,ve->ble", probabilities, embeddings, precision=highest))
