"""From the last hidden states to what a network says of tokens, in memory that doesn't grow with L x V."""

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
    """Rows [..., E] brought to size sqrt(E), float32: what a network that is fed vectors has for a piece's. Their
    directions are learned, their size can neither vanish nor drown noise."""
    rows = rows.astype(jnp.float32)
    return rows * jax.lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + 1e-6)


@struct.dataclass
class ChunkedLogits:
    """hidden float32 [B, L, E] times table [rows, E], of which the first `vocab` rows are pieces; vectors [rows, E]."""

    hidden: Array
    table: Array
    vocab: int = struct.field(pytree_node=False)
    alignment: Alignment = struct.field(pytree_node=False)
    compute_dtype: str = struct.field(pytree_node=False)
    shards: int = struct.field(pytree_node=False, default=1)  # ways that a mesh cuts rows
    along: int = struct.field(pytree_node=False, default=1)  # ways that it cuts each row
    embeddings: Array | None = None
    aux_loss: Array | None = None

    def logits(self) -> Array:
        """float32 [B, L, V]; the padding rows and the mask are cut off."""
        return dot("ble,ve->blv", self.hidden, self.table, self.compute_dtype)[..., : self.vocab]

    def gather(self, index: Array) -> "ChunkedLogits":
        """See `types.LogitsHead`."""
        return self.replace(hidden=jnp.take_along_axis(self.hidden, index[..., None], axis=1))

    def weighted_loss(
        self,
        nats: Callable,
        weights: Array,
        *arguments: Array,
        shared: tuple[Array, ...] = (),
        teacher: "ChunkedLogits | None" = None,
    ) -> Array:
        """See `types.LogitsHead`. Exact; gradients are formed chunk by chunk in the forward pass (no logits are kept)."""
        if teacher is not None:
            nats = functools.partial(_beside, nats, teacher.vocab, teacher.compute_dtype)
            hidden, table = jax.lax.stop_gradient((teacher.hidden, _gathered(teacher.table, teacher.compute_dtype)))
            arguments, shared = (hidden, arguments), (table, shared)
        return _total(
            self.hidden, self.table, weights, arguments, shared, nats, self.vocab, self.compute_dtype, self._ways
        )

    def cross_entropy(self, targets: Array, weights: Array) -> Array:
        """See `types.LogitsHead`."""
        return self.weighted_loss(cross_entropy, weights, targets)

    def map_positions(self, ask: Callable, *arguments: Array) -> Array:
        """See `types.LogitsHead`."""
        return self._each(lambda scores, *rest: ask(scores[..., : self.vocab], *rest), *arguments)

    def select(self, here: Array, other: "ChunkedLogits") -> "ChunkedLogits":
        """See `types.LogitsHead`."""
        return self.replace(hidden=jnp.where(here[..., None], self.hidden, other.hidden))

    def expected_embedding(self) -> Array:
        """See `types.LogitsHead`. Raises ValueError for a network that isn't fed vectors."""
        if self.embeddings is None:
            raise ValueError("this network is fed no vectors: set model.self_conditioning=true")
        vectors = jax.lax.stop_gradient(self.embeddings)
        return self._each(
            lambda scores: dot("blv,ve->ble", jax.nn.softmax(scores, axis=-1), vectors, self.compute_dtype)
        )

    def _each(self, ask: Callable, *arguments: Array) -> Array:
        """`each`, of scores [B, c, rows] as `_scores` has them."""

        def one(_, chunk):
            h, rest = chunk
            return None, ask(_scores(h, table, self.vocab, self.compute_dtype), *rest)

        hidden, table = jax.lax.stop_gradient((self.hidden, _gathered(self.table, self.compute_dtype)))
        said = jax.lax.scan(one, None, _chunks((hidden, arguments), *self._ways))[1]
        return _joined(said, *self.hidden.shape[:2], self._ways[1])

    @property
    def _ways(self) -> tuple[int, int]:
        """Ways that hidden is cut, along B and along L."""
        batch, length, _ = self.hidden.shape
        return 1 if batch % self.shards else self.shards, 1 if length % self.along else self.along


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _total(hidden, table, weights, arguments, shared, nats, vocab, compute_dtype, ways):
    def add(total, chunk):
        h, w, rest = chunk
        return total + _weighed(_scores(h, table, vocab, compute_dtype), shared, nats, w, rest)[0], None

    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), _chunks((hidden, weights, arguments), *ways))
    return total


def _forward(hidden, table, weights, arguments, shared, nats, vocab, compute_dtype, ways):
    """The loss and its gradients in one sweep. Each device sums up the table's gradient of its own rows; they are added
    to each other once, after the sweep, and not in each of its turns."""
    rounded = _gathered(table, compute_dtype)
    sweep = jax.value_and_grad(_weighed, argnums=(0, 1), has_aux=True)

    def add(carry, chunk):
        total, d_table, d_shared = carry
        h, w, rest = chunk
        (here, costs), (d_scores, more) = sweep(_scores(h, rounded, vocab, compute_dtype), shared, nats, w, rest)
        d_table += _of_table(d_scores, h, compute_dtype, ways)
        d_shared = jax.tree.map(jnp.add, d_shared, more)
        return (total + here, d_table, d_shared), (dot("blv,ve->ble", d_scores, rounded, compute_dtype), costs)

    start = jnp.zeros((), jnp.float32), jnp.zeros((*ways, *table.shape), jnp.float32)
    start = *start, jax.tree.map(jnp.zeros_like, shared)
    (total, d_table, d_shared), found = jax.lax.scan(add, start, _chunks((hidden, weights, arguments), *ways))
    d_table = nn.with_logical_constraint(jnp.sum(d_table, axis=(0, 1)), ("vocab", "embed"))
    d_hidden, costs = (_joined(a, *hidden.shape[:2], ways[1]) for a in found)
    return total, (d_hidden, d_table, costs, arguments, d_shared)


def _gathered(table: Array, compute_dtype: str) -> Array:
    """The table as products take it, and gathered, once: what is cut along its width would be gathered anew in each
    turn of a sweep."""
    return nn.with_logical_constraint(table.astype(compute_dtype), ("vocab", None))


def _of_table(d_scores: Array, h: Array, compute_dtype: str, ways: tuple[int, int]) -> Array:
    """[B, c, rows] and [B, c, E] -> float32 [*ways, rows, E], each device's sums over its own positions."""
    if ways == (1, 1):
        return dot("blv,ble->ve", d_scores, h, compute_dtype)[None, None]
    shards, along = ways
    d_scores, h = (a.reshape(shards, -1, along, a.shape[1] // along, a.shape[2]) for a in (d_scores, h))
    sums = dot("wbxlv,wbxle->wxve", d_scores, h, compute_dtype)
    return nn.with_logical_constraint(sums, ("batch", "length", "vocab", None))


def _backward(nats, vocab, compute_dtype, ways, gradients, g):
    d_hidden, d_table, costs, arguments, d_shared = gradients
    d_shared = jax.tree.map(lambda a: g.astype(a.dtype) * a, d_shared)
    return g * d_hidden, g * d_table, g * costs, jax.tree.map(_no_gradient, arguments), d_shared


_total.defvjp(_forward, _backward)


def _weighed(scores: Array, shared: Any, nats: Callable, weights: Array, arguments: Any) -> tuple[Array, Array]:
    """sum of weights * nats, and the nats, both without those where the weight is 0, whatever they are."""
    costs = jnp.where(weights != 0, nats(scores, *arguments, *shared), 0.0)
    return jnp.sum(weights * costs), costs


def _beside(nats, vocab, compute_dtype, scores, hidden, arguments, table, shared) -> Array:
    """`nats`, called with a teacher's scores as well."""
    said = _scores(hidden, jax.lax.stop_gradient(table), vocab, compute_dtype)
    return nats(scores, said, *arguments, *shared)


def _no_gradient(a: Array) -> Array:
    if jnp.issubdtype(a.dtype, jnp.floating):
        return jnp.zeros_like(a)
    return jnp.zeros(a.shape, jax.dtypes.float0)


def _scores(h: Array, table: Array, vocab: int, compute_dtype: str) -> Array:
    """[B, c, E] -> float32 [B, c, rows], minus infinity on rows that are no piece."""
    scores = dot("ble,ve->blv", h, table, compute_dtype)
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


def _joined(chunks: Array, batch: int, length: int, along: int) -> Array:
    """[chunks, B, c, ...] -> [B, L, ...]: what `_chunks` did, undone."""
    rest = chunks.shape[3:]
    parts = jnp.moveaxis(chunks.reshape(-1, batch, along, chunks.shape[2] // along, *rest), 0, 2)
    return parts.reshape(batch, along, -1, *rest)[:, :, : length // along].reshape(batch, length, *rest)
