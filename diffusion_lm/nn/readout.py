"""From the last hidden states to what a network says of tokens, in memory that doesn't grow with L x V."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.nn.dot import dot
from diffusion_lm.types import Alignment, surprise

Array = jax.Array
_CHUNK_ROWS = 512  # logits of this many positions a device exist at once


def unit(rows: Array) -> Array:
    """Rows [..., E] brought to size sqrt(E), float32: what a network that is fed vectors has for a piece's. Their
    directions are learned, their size can neither vanish nor drown noise."""
    rows = rows.astype(jnp.float32)
    return rows * jax.lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + 1e-6)


@struct.dataclass
class Projection:
    """hidden float32 [B, L, E] times table [rows, E], of which the first `vocab` rows are pieces; vectors [rows, E]."""

    hidden: Array
    table: Array
    vocab: int = struct.field(pytree_node=False)
    alignment: Alignment = struct.field(pytree_node=False)
    products: str = struct.field(pytree_node=False)
    shards: int = struct.field(pytree_node=False, default=1)  # ways that a mesh cuts rows
    along: int = struct.field(pytree_node=False, default=1)  # ways that it cuts each row
    vectors: Array | None = None
    penalty: Array | None = None

    def logits(self) -> Array:
        """float32 [B, L, V]; the padding rows and the mask are cut off."""
        return dot("ble,ve->blv", self.hidden, self.table, self.products)[..., : self.vocab]

    def pick(self, index: Array) -> "Projection":
        """See `types.Readout`."""
        return self.replace(hidden=jnp.take_along_axis(self.hidden, index[:, None, None], axis=1))

    def total(self, nats: Callable, weights: Array, *arguments: Array) -> Array:
        """See `types.Readout`. Exact; gradients are formed chunk by chunk in the forward pass (no logits are kept)."""
        return _total(self.hidden, self.table, weights, arguments, nats, self.vocab, self.products, self._ways)

    def cross_entropy(self, targets: Array, weights: Array) -> Array:
        """See `types.Readout`."""
        return self.total(surprise, weights, targets)

    def mean_vector(self) -> Array:
        """See `types.Readout`. Raises ValueError for a network that isn't fed vectors."""
        if self.vectors is None:
            raise ValueError("this network is fed no vectors: set model.self_conditioning=true")
        hidden, table, vectors = jax.lax.stop_gradient((self.hidden, self.table, self.vectors))

        def one(_, h):
            p = jax.nn.softmax(_scores(h, table, self.vocab, self.products), axis=-1)
            return None, dot("blv,ve->ble", p, vectors, self.products)

        return _joined(jax.lax.scan(one, None, _chunks(hidden, *self._ways))[1], hidden.shape, self._ways[1])

    @property
    def _ways(self) -> tuple[int, int]:
        """Ways that hidden is cut, along B and along L."""
        batch, length, _ = self.hidden.shape
        return 1 if batch % self.shards else self.shards, 1 if length % self.along else self.along


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _total(hidden, table, weights, arguments, nats, vocab, products, ways):
    def add(total, chunk):
        h, w, rest = chunk
        return total + _weighed(nats, _scores(h, table, vocab, products), w, rest), None

    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), _chunks((hidden, weights, arguments), *ways))
    return total


def _forward(hidden, table, weights, arguments, nats, vocab, products, ways):
    """The loss and its gradients in one sweep. Each device sums up the table's gradient of its own rows; they are added
    to each other once, after the sweep, and not in each of its turns."""
    # Gathered here, once: what is cut along its width would be gathered anew in each turn.
    rounded = nn.with_logical_constraint(table.astype(products), ("vocab", None))

    def add(carry, chunk):
        total, d_table = carry
        h, w, rest = chunk
        scores = _scores(h, rounded, vocab, products)
        here, d_scores = jax.value_and_grad(_weighed, argnums=1)(nats, scores, w, rest)
        d_table += _of_table(d_scores, h, products, ways)
        return (total + here, d_table), dot("blv,ve->ble", d_scores, rounded, products)

    start = jnp.zeros((), jnp.float32), jnp.zeros((*ways, *table.shape), jnp.float32)
    (total, d_table), d_hidden = jax.lax.scan(add, start, _chunks((hidden, weights, arguments), *ways))
    d_table = nn.with_logical_constraint(jnp.sum(d_table, axis=(0, 1)), ("vocab", "embed"))
    return total, (_joined(d_hidden, hidden.shape, ways[1]), d_table, weights, arguments)


def _of_table(d_scores: Array, h: Array, products: str, ways: tuple[int, int]) -> Array:
    """[B, c, rows] and [B, c, E] -> float32 [*ways, rows, E], each device's sums over its own positions."""
    if ways == (1, 1):
        return dot("blv,ble->ve", d_scores, h, products)[None, None]
    shards, along = ways
    d_scores, h = (a.reshape(shards, -1, along, a.shape[1] // along, a.shape[2]) for a in (d_scores, h))
    sums = dot("wbxlv,wbxle->wxve", d_scores, h, products)
    return nn.with_logical_constraint(sums, ("batch", "length", "vocab", None))


def _backward(nats, vocab, products, ways, gradients, g):
    d_hidden, d_table, weights, arguments = gradients
    return g * d_hidden, g * d_table, jnp.zeros_like(weights), jax.tree.map(_no_gradient, arguments)


_total.defvjp(_forward, _backward)


def _weighed(nats: Callable, scores: Array, weights: Array, arguments: tuple) -> Array:
    """sum of weights * nats, whatever nats are where the weight is 0."""
    return jnp.sum(jnp.where(weights != 0, weights * nats(scores, *arguments), 0.0))


def _no_gradient(a: Array) -> Array:
    if jnp.issubdtype(a.dtype, jnp.floating):
        return jnp.zeros_like(a)
    return jnp.zeros(a.shape, jax.dtypes.float0)


def _scores(h: Array, table: Array, vocab: int, products: str) -> Array:
    """[B, c, E] -> float32 [B, c, rows], minus infinity on rows that are no piece."""
    scores = dot("ble,ve->blv", h, table, products)
    return jnp.where(_rows(scores) < vocab, scores, -jnp.inf)


def _rows(scores: Array) -> Array:
    return jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]


def _chunks(arrays, shards: int, along: int):
    """[B, L, ...] -> [chunks, B, c, ...], some _CHUNK_ROWS a device: cut along L, so that the batch stays sharded, and
    each chunk has positions from each of a row's `along` devices."""
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    part = length // along
    size = min(part, max(1, _CHUNK_ROWS * shards // batch))

    def cut(a):
        a = a.reshape(batch, along, part, *a.shape[2:])
        a = jnp.pad(a, [(0, 0), (0, 0), (0, -part % size)] + [(0, 0)] * (a.ndim - 3))
        a = jnp.moveaxis(a.reshape(batch, along, -1, size, *a.shape[3:]), 2, 0)
        return a.reshape(-1, batch, along * size, *a.shape[4:])

    return jax.tree.map(cut, arrays)


def _joined(chunks: Array, shape: tuple[int, ...], along: int) -> Array:
    """What `_chunks` did to [B, L, E], undone."""
    batch, length, width = shape
    parts = jnp.moveaxis(chunks.reshape(-1, batch, along, chunks.shape[2] // along, width), 0, 2)
    return parts.reshape(batch, along, -1, width)[:, :, : length // along].reshape(shape)
