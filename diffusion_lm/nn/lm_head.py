"""From the last hidden states to logits, losses and samples, in memory that doesn't grow with L x V."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
        """See `types.LogitsHead`. Exact: gradients are computed chunk by chunk in the forward pass. Positions
        of weight 0 come last, and chunks of nothing else are left out: nearly half of the work under masks."""
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
        hidden, table = jax.lax.stop_gradient((self.hidden, _gathered(self.table, self.spec.compute_dtype)))
        places = _Places.every(hidden.shape[:2], self._ways)
        laid = places.laid((hidden, arguments))

        def one(_, i):
            h, rest = places.pick(laid, i)
            return None, function(self.spec.scores(h, table), *rest)

        return places.join(jax.lax.scan(one, None, jnp.arange(places.used))[1], hidden.shape[:2])

    @property
    def _ways(self) -> tuple[int, int]:
        """Into how many parts `hidden` is cut along B and along L."""
        batch, length, _ = self.hidden.shape
        return 1 if batch % self.row_parts else self.row_parts, 1 if length % self.length_parts else self.length_parts


class _Places(NamedTuple):
    """An order of positions [B, L], to go over in chunks of _CHUNK_ROWS positions a device.

    Each device has its own rows and parts of rows, so that no position leaves its device, nor the batch its shards.
    """

    order: Array  # int32 [row_parts, length_parts, n]: which of the n positions of each device comes i-th
    back: Array  # int32, as order: the i at which each position comes
    most: Array | int  # int32 []: chosen positions of the device that has most

    @classmethod
    def every(cls, shape: tuple[int, int], ways: tuple[int, int]) -> "_Places":
        """All of [B, L], as they lie."""
        number = shape[0] * shape[1] // (ways[0] * ways[1])
        order = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), (*ways, number))
        return cls(order, order, number)

    @classmethod
    def first(cls, chosen: Array, ways: tuple[int, int]) -> "_Places":
        """Chosen positions first; chosen: bool [B, L]."""
        chosen = _by_device(chosen, ways)
        order = jnp.argsort(~chosen, axis=2, stable=True).astype(jnp.int32)
        return cls(order, jnp.argsort(order, axis=2), jnp.max(jnp.sum(chosen, axis=2, dtype=jnp.int32)))

    @property
    def used(self) -> Array | int:
        """How many chunks have a chosen position."""
        return -(-self.most // self.size)

    @property
    def size(self) -> int:
        """Positions of a chunk on each device."""
        return min(self.order.shape[2], _CHUNK_ROWS)

    @property
    def chunks(self) -> int:
        """How many chunks all positions make."""
        return -(-self.order.shape[2] // self.size)

    def laid(self, arrays: Any) -> Any:
        """Arrays [B, L, ...] as `pick` reads them."""
        return jax.tree.map(lambda a: _by_device(a, self.order.shape[:2]), arrays)

    def pick(self, laid: Any, i: Array) -> Any:
        """Chunk i of each array, [row_parts, length_parts * size, ...]; see `counted`."""
        last = self.order.shape[2] - 1
        index = self.order[:, :, jnp.minimum(i * self.size + jnp.arange(self.size), last)]

        def pick(a: Array) -> Array:
            found = jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 3)), axis=2)
            return found.reshape(found.shape[0], -1, *found.shape[3:])

        return jax.tree.map(pick, laid)

    def counted(self, i: Array) -> Array:
        """bool [1, length_parts * size]: False where the last chunk is filled up with one position again and again."""
        within = i * self.size + jnp.arange(self.size) < self.order.shape[2]
        return jnp.tile(within, self.order.shape[1])[None]

    def join(self, found: Array, shape: tuple[int, int]) -> Array:
        """[chunks, row_parts, length_parts * size, ...] -> [B, L, ...], of this shape: undoes `pick`."""
        row_parts, length_parts, n = self.order.shape
        rest = found.shape[3:]
        found = jnp.moveaxis(found.reshape(-1, row_parts, length_parts, self.size, *rest), 0, 2)
        found = found.reshape(row_parts, length_parts, -1, *rest)[:, :, :n]
        found = jnp.take_along_axis(found, self.back.reshape(*self.back.shape, *[1] * len(rest)), axis=2)
        found = found.reshape(row_parts, length_parts, shape[0] // row_parts, shape[1] // length_parts, *rest)
        return jnp.swapaxes(found, 1, 2).reshape(*shape, *rest)


def _by_device(a: Array, ways: tuple[int, int]) -> Array:
    """[B, L, ...] -> [row_parts, length_parts, n, ...]: the positions that each device of a mesh has."""
    (batch, length), (row_parts, length_parts), rest = a.shape[:2], ways, a.shape[2:]
    a = a.reshape(row_parts, batch // row_parts, length_parts, length // length_parts, *rest)
    return jnp.swapaxes(a, 1, 2).reshape(row_parts, length_parts, -1, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _total(hidden, table, weights, arguments, shared, loss, spec, ways):
    places = _Places.first(weights != 0, ways)
    laid = places.laid((hidden, weights, arguments))

    def add(i, total):
        h, w, rest = places.pick(laid, i)
        w = jnp.where(places.counted(i), w, 0.0)
        return total + _weighted(spec.scores(h, table), shared, loss, w, rest)[0]

    return jax.lax.fori_loop(0, places.used, add, jnp.zeros((), jnp.float32))


def _forward(hidden, table, weights, arguments, shared, loss, spec, ways):
    """The loss and its gradients in one sweep. Each device sums the table's gradient over its own rows; these are added
    once, after the sweep, and not in each of its turns."""
    rounded = _gathered(table, spec.compute_dtype)
    sweep = jax.value_and_grad(_weighted, argnums=(0, 1), has_aux=True)
    places = _Places.first(weights != 0, ways)
    laid = places.laid((hidden, weights, arguments))

    def add(i, sums):
        total, d_table, d_shared, d_hidden, costs = sums
        h, w, rest = places.pick(laid, i)
        scores = spec.scores(h, rounded)
        (here, cost), (d_scores, more) = sweep(scores, shared, loss, jnp.where(places.counted(i), w, 0.0), rest)
        d_scores = spec.before_cap(d_scores, scores)
        d_table += _of_table(d_scores, h, spec.compute_dtype, ways)
        d_shared = jax.tree.map(jnp.add, d_shared, more)
        d_h = dot("blv,ve->ble", d_scores, rounded, spec.compute_dtype)
        return total + here, d_table, d_shared, d_hidden.at[i].set(d_h), costs.at[i].set(cost)

    chunk = places.chunks, ways[0], ways[1] * places.size
    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((*ways, *table.shape), jnp.float32),
        jax.tree.map(jnp.zeros_like, shared),
    )
    start = *start, jnp.zeros((*chunk, hidden.shape[2]), jnp.float32), jnp.zeros(chunk, jnp.float32)
    total, d_table, d_shared, *found = jax.lax.fori_loop(0, places.used, add, start)
    d_table = nn.with_logical_constraint(jnp.sum(d_table, axis=(0, 1)), ("vocab", "embed"))
    d_hidden, costs = (places.join(a, weights.shape) for a in found)
    return total, (d_hidden, d_table, costs, arguments, d_shared)


def _gathered(table: Array, compute_dtype: str) -> Array:
    """The table in the products' type, gathered once and not in each turn of a sweep."""
    return nn.with_logical_constraint(table.astype(compute_dtype), ("vocab", None))


def _of_table(d_scores: Array, h: Array, compute_dtype: str, ways: tuple[int, int]) -> Array:
    """[row_parts, c, rows] and [row_parts, c, E] -> float32 [*ways, rows, E], each device's sums over its positions."""
    if ways == (1, 1):
        return dot("blv,ble->ve", d_scores, h, compute_dtype)[None, None]
    row_parts, length_parts = ways
    d_scores, h = (a.reshape(row_parts, length_parts, -1, a.shape[2]) for a in (d_scores, h))
    sums = dot("wxlv,wxle->wxve", d_scores, h, compute_dtype)
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
