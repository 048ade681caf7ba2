"""From the last hidden states to what a network says of tokens, in memory that doesn't grow with L x V."""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.nn.dot import dot
from diffusion_lm.types import Alignment

Array = jax.Array
_CHUNK_ROWS = 512  # logits of this many positions a device exist at once


@struct.dataclass
class Projection:
    """hidden float32 [B, L, E] times table [rows, E], of which the first `vocab` rows are pieces."""

    hidden: Array
    table: Array
    vocab: int = struct.field(pytree_node=False)
    alignment: Alignment = struct.field(pytree_node=False)
    products: str = struct.field(pytree_node=False)
    shards: int = struct.field(pytree_node=False, default=1)

    def logits(self) -> Array:
        """float32 [B, L, V]; the padding rows and the mask are cut off."""
        return dot("ble,ve->blv", self.hidden, self.table, self.products)[..., : self.vocab]

    def pick(self, index: Array) -> "Projection":
        """See `types.Readout`."""
        return self.replace(hidden=jnp.take_along_axis(self.hidden, index[:, None, None], axis=1))

    def cross_entropy(self, targets: Array, weights: Array) -> Array:
        """See `types.Readout`. Exact; gradients are formed chunk by chunk in the forward pass (no logits are kept)."""
        rows = _CHUNK_ROWS * self.shards
        return _cross_entropy(self.hidden, self.table, targets, weights, self.vocab, self.products, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(hidden, table, targets, weights, vocab, products, rows):
    def add(total, chunk):
        h, y, w = chunk
        return total + jnp.sum(w * _nats(_scores(h, table, vocab, products), y)), None

    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), _chunks(hidden, targets, weights, rows))
    return total


def _forward(hidden, table, targets, weights, vocab, products, rows):
    """The loss and its gradients in one sweep: d loss / d scores = weights x (softmax - one-hot)."""
    rounded = table.astype(products)

    def add(carry, chunk):
        total, d_table = carry
        h, y, w = chunk
        scores = _scores(h, rounded, vocab, products)
        log_z = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        one_hot = _rows(scores) == y[..., None]
        picked = jnp.sum(jnp.where(one_hot, scores, 0.0), axis=-1)
        d_scores = w[..., None] * (jnp.exp(scores - log_z) - one_hot)
        d_table += dot("blv,ble->ve", d_scores, h, products)
        return (total + jnp.sum(w * (log_z[..., 0] - picked)), d_table), dot("blv,ve->ble", d_scores, rounded, products)

    start = jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32)
    (total, d_table), d_hidden = jax.lax.scan(add, start, _chunks(hidden, targets, weights, rows))
    return total, (_joined(d_hidden, hidden.shape), d_table, targets, weights)


def _backward(vocab, products, rows, gradients, g):
    d_hidden, d_table, targets, weights = gradients
    no_gradient = jnp.zeros(targets.shape, jax.dtypes.float0)
    return g * d_hidden, g * d_table, no_gradient, jnp.zeros_like(weights)


_cross_entropy.defvjp(_forward, _backward)


def _scores(h: Array, table: Array, vocab: int, products: str) -> Array:
    """[B, c, E] -> float32 [B, c, rows], minus infinity on rows that are no piece."""
    scores = dot("ble,ve->blv", h, table, products)
    return jnp.where(_rows(scores) < vocab, scores, -jnp.inf)


def _rows(scores: Array) -> Array:
    return jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]


def _nats(scores: Array, targets: Array) -> Array:
    """-log softmax(scores)[targets]."""
    picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - picked


def _chunks(hidden: Array, targets: Array, weights: Array, rows: int):
    """[B, L, ...] -> [chunks, B, c, ...] with B x c about `rows`: cut along L, so that the batch stays sharded.

    Targets of no weight become piece 0, so that no minus infinity is picked.
    """
    batch, length, _ = hidden.shape
    size = min(length, max(1, rows // batch))
    targets = jnp.where(weights != 0, targets, 0)

    def cut(a):
        a = jnp.pad(a, [(0, 0), (0, -length % size)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, -1, size, *a.shape[2:]), 1, 0)

    return cut(hidden), cut(targets), cut(weights)


def _joined(chunks: Array, shape: tuple[int, ...]) -> Array:
    return jnp.moveaxis(chunks, 0, 1).reshape(shape[0], -1, shape[2])[:, : shape[1]]
