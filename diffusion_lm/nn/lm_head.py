"""From the last hidden states to logits, losses and samples, in memory that doesn't grow with L x V."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.nn.dot import dot
from diffusion_lm.types import Alignment, cross_entropy

Array = jax.Array
_CHUNK_ROWS = 512  # logits of this many positions a device exist at once


def unit(rows: Array) -> Array:
    """Rows [..., E] scaled to norm sqrt(E), float32: the input embeddings of a network that takes embeddings. Their
    directions are learned; their norm can neither vanish nor drown noise."""
    rows = rows.astype(jnp.float32)
    return rows * jax.lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + 1e-6)


@dataclasses.dataclass(frozen=True)
class LogitsSpec:
    """How a row's logits come from its hidden state.

    Args:
        size: the table's first `size` rows are ids with logits; what follows pads the table.
        compute_dtype: the product's type.
        never: ids below size that are never predicted; their logits are minus infinity.
        softcap: logits are c tanh(logits / c); 0 for none.
    """

    size: int
    compute_dtype: str
    never: tuple[int, ...] = ()
    softcap: float = 0.0

    def scores(self, h: Array, table: Array) -> Array:
        """[B, c, E] -> float32 [B, c, rows], minus infinity for padding rows and ids that are never predicted."""
        scores = dot("ble,ve->blv", h, table, self.compute_dtype)
        if self.softcap:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        rows = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]
        allowed = rows < self.size
        for i in self.never:
            allowed &= rows != i
        return jnp.where(allowed, scores, -jnp.inf)

    def before_cap(self, d_scores: Array, scores: Array) -> Array:
        """The gradient of the product, from that of the scores."""
        if not self.softcap:
            return d_scores
        return jnp.where(jnp.isfinite(scores), d_scores * (1.0 - (scores / self.softcap) ** 2), 0.0)


@struct.dataclass
class ChunkedLogits:
    """The LogitsHead of hidden states float32 [B, L, E] and a table [rows, E] (embeddings [rows, E]: the inputs')."""

    hidden: Array
    table: Array
    spec: LogitsSpec = struct.field(pytree_node=False)
    alignment: Alignment = struct.field(pytree_node=False)
    row_parts: int = struct.field(pytree_node=False, default=1)  # into how many parts a mesh cuts the batch
    length_parts: int = struct.field(pytree_node=False, default=1)  # and each row
    embeddings: Array | None = None
    aux_loss: Array | None = None

    def logits(self) -> Array:
        """See `types.LogitsHead`."""
        if self.spec.never or self.spec.softcap:
            return self.spec.scores(self.hidden, self.table)[..., : self.spec.size]
        return dot("ble,ve->blv", self.hidden, self.table, self.spec.compute_dtype)[..., : self.spec.size]

    def gather(self, index: Array) -> "ChunkedLogits":
        """See `types.LogitsHead`."""
        return self.replace(hidden=jnp.take_along_axis(self.hidden, index[..., None], axis=1))

    def weighted_loss(
        self,
        loss: Callable,
        weights: Array,
        *arguments: Array,
        shared: tuple[Array, ...] = (),
        teacher: "ChunkedLogits | None" = None,
    ) -> Array:
        """See `types.LogitsHead`. Exact: gradients are computed chunk by chunk in the forward pass."""
        if teacher is not None:
            loss = functools.partial(_with_teacher, loss, teacher.spec)
            table = _gathered(teacher.table, teacher.spec.compute_dtype)
            hidden, table = jax.lax.stop_gradient((teacher.hidden, table))
            arguments, shared = (hidden, arguments), (table, shared)
        return _total(self.hidden, self.table, weights, arguments, shared, loss, self.spec, self._ways)

    def cross_entropy(self, targets: Array, weights: Array) -> Array:
        """See `types.LogitsHead`."""
        return self.weighted_loss(cross_entropy, weights, targets)

    def map_positions(self, function: Callable, *arguments: Array) -> Array:
        """See `types.LogitsHead`."""
        return self._map(lambda scores, *rest: function(scores[..., : self.spec.size], *rest), *arguments)

    def select(self, here: Array, other: "ChunkedLogits") -> "ChunkedLogits":
        """See `types.LogitsHead`."""
        return self.replace(hidden=jnp.where(here[..., None], self.hidden, other.hidden))

    def expected_embedding(self) -> Array:
        """See `types.LogitsHead`. Raises ValueError for a network that takes no embeddings."""
        if self.embeddings is None:
            raise ValueError("this network takes no embeddings as inputs: set model.self_conditioning=true")
        table, dtype = jax.lax.stop_gradient(self.embeddings), self.spec.compute_dtype
        return self._map(lambda scores: dot("blv,ve->ble", jax.nn.softmax(scores, axis=-1), table, dtype))

    def _map(self, function: Callable, *arguments: Array) -> Array:
        """`map_positions`, for scores [B, c, rows]."""

        def one(_, chunk):
            h, rest = chunk
            return None, function(self.spec.scores(h, table), *rest)

        hidden, table = jax.lax.stop_gradient((self.hidden, _gathered(self.table, self.spec.compute_dtype)))
        found = jax.lax.scan(one, None, _chunks((hidden, arguments), *self._ways))[1]
        return _joined(found, *self.hidden.shape[:2], self._ways[1])

    @property
    def _ways(self) -> tuple[int, int]:
        """Into how many parts `hidden` is cut along B and along L."""
        batch, length, _ = self.hidden.shape
        return 1 if batch % self.row_parts else self.row_parts, 1 if length % self.length_parts else self.length_parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _total(hidden, table, weights, arguments, shared, loss, spec, ways):
    def add(total, chunk):
        h, w, rest = chunk
        return total + _weighted(spec.scores(h, table), shared, loss, w, rest)[0], None

    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), _chunks((hidden, weights, arguments), *ways))
    return total


def _forward(hidden, table, weights, arguments, shared, loss, spec, ways):
    """The loss and its gradients in one sweep. Each device sums the table's gradient over its own rows; these are added
    once, after the sweep, and not in each of its turns."""
    rounded = _gathered(table, spec.compute_dtype)
    sweep = jax.value_and_grad(_weighted, argnums=(0, 1), has_aux=True)

    def add(carry, chunk):
        total, d_table, d_shared = carry
        h, w, rest = chunk
        scores = spec.scores(h, rounded)
        (here, costs), (d_scores, more) = sweep(scores, shared, loss, w, rest)
        d_scores = spec.before_cap(d_scores, scores)
        d_table += _of_table(d_scores, h, spec.compute_dtype, ways)
        d_shared = jax.tree.map(jnp.add, d_shared, more)
        return (total + here, d_table, d_shared), (dot("blv,ve->ble", d_scores, rounded, spec.compute_dtype), costs)

    start = jnp.zeros((), jnp.float32), jnp.zeros((*ways, *table.shape), jnp.float32)
    start = *start, jax.tree.map(jnp.zeros_like, shared)
    (total, d_table, d_shared), found = jax.lax.scan(add, start, _chunks((hidden, weights, arguments), *ways))
    d_table = nn.with_logical_constraint(jnp.sum(d_table, axis=(0, 1)), ("vocab", "embed"))
    d_hidden, costs = (_joined(a, *hidden.shape[:2], ways[1]) for a in found)
    return total, (d_hidden, d_table, costs, arguments, d_shared)


def _gathered(table: Array, compute_dtype: str) -> Array:
    """The table in the products' type, gathered once and not in each turn of a sweep."""
    return nn.with_logical_constraint(table.astype(compute_dtype), ("vocab", None))


def _of_table(d_scores: Array, h: Array, compute_dtype: str, ways: tuple[int, int]) -> Array:
    """[B, c, rows] and [B, c, E] -> float32 [*ways, rows, E], each device's sums over its own positions."""
    if ways == (1, 1):
        return dot("blv,ble->ve", d_scores, h, compute_dtype)[None, None]
    row_parts, length_parts = ways
    d_scores, h = (
        a.reshape(row_parts, -1, length_parts, a.shape[1] // length_parts, a.shape[2]) for a in (d_scores, h)
    )
    sums = dot("wbxlv,wbxle->wxve", d_scores, h, compute_dtype)
    return nn.with_logical_constraint(sums, ("batch", "length", "vocab", None))


def _backward(loss, spec, ways, gradients, g):
    def none(a: Array) -> Array:
        floating = jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.zeros_like(a) if floating else jnp.zeros(a.shape, jax.dtypes.float0)

    d_hidden, d_table, costs, arguments, d_shared = gradients
    d_shared = jax.tree.map(lambda a: g.astype(a.dtype) * a, d_shared)
    return g * d_hidden, g * d_table, g * costs, jax.tree.map(none, arguments), d_shared


_total.defvjp(_forward, _backward)


def _weighted(scores: Array, shared: Any, loss: Callable, weights: Array, arguments: Any) -> tuple[Array, Array]:
    """The sum of weights * losses, and the losses, both without those where the weight is 0, whatever they are."""
    costs = jnp.where(weights != 0, loss(scores, *arguments, *shared), 0.0)
    return jnp.sum(weights * costs), costs


def _with_teacher(loss, spec, scores, hidden, arguments, table, shared) -> Array:
    """`loss`, called with a teacher's scores as well."""
    taught = spec.scores(hidden, jax.lax.stop_gradient(table))
    return loss(scores, taught, *arguments, *shared)


def _chunks(arrays, row_parts: int, length_parts: int):
    """[B, L, ...] -> [chunks, B, c, ...], about _CHUNK_ROWS positions a device: cut along L, so that the batch stays
    sharded, and each chunk has positions from each of the devices that share a row."""
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    part = length // length_parts
    size = min(part, max(1, _CHUNK_ROWS * row_parts // batch))

    def cut(a):
        a = a.reshape(batch, length_parts, part, *a.shape[2:])
        a = jnp.pad(a, [(0, 0), (0, 0), (0, -part % size)] + [(0, 0)] * (a.ndim - 3))
        a = jnp.moveaxis(a.reshape(batch, length_parts, -1, size, *a.shape[3:]), 2, 0)
        return a.reshape(-1, batch, length_parts * size, *a.shape[4:])

    return jax.tree.map(cut, arrays)


def _joined(chunks: Array, batch: int, length: int, length_parts: int) -> Array:
    """[chunks, B, c, ...] -> [B, L, ...]: undoes `_chunks`."""
    rest = chunks.shape[3:]
    parts = jnp.moveaxis(chunks.reshape(-1, batch, length_parts, chunks.shape[2] // length_parts, *rest), 0, 2)
    return parts.reshape(batch, length_parts, -1, *rest)[:, :, : length // length_parts].reshape(batch, length, *rest)
