"""A mixture of experts: of many feed-forward layers each position uses a few. There is no capacity limit.

Positions are sorted by expert and computed in blocks of one expert each, as many as are needed: the chosen pairs of
position and expert, and up to a tenth more to fill the blocks. (`jax.lax.ragged_dot` computes every expert for every
position on CPUs and on NVIDIA's GPUs, jax 0.10.2.) A block's products are formed anew in the backward pass.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.nn.dot import dot, matrix, ones
from diffusion_lm.nn.specs import Execution, ExpertsSpec
from diffusion_lm.sharding import each_device

Array = jax.Array
_BLOCK = 512  # rows of a block at most
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Experts(nn.Module):
    """Gated feed-forwards, of which each position uses those that `choose` says, and their weighted sum."""

    spec: ExpertsSpec
    exec: Execution

    @nn.compact
    def __call__(self, x: Array, counted: Array | None = None, routed: Array | None = None) -> tuple[Array, Array]:
        """Applies the experts.

        Args:
            x: [B, L, E].
            counted: bool [B, L], the positions that the load-balancing loss counts; None for all.
            routed: [B, L, E], what the router reads; None for x.

        Returns:
            float32 [B, L, E], and the load-balancing loss, float32 [].
        """
        a, width = self.spec, x.shape[-1]
        router = matrix(self, "router", (width, a.num_experts), ("embed", None), width)
        up = matrix(self, "gate_up", (a.num_experts, width, 2, a.dim), ("experts", "embed", None, "mlp"), width)
        down = matrix(self, "down", (a.num_experts, a.dim, width), ("experts", "mlp", "embed"), 0)
        routed = x if routed is None else routed
        if a.router_norm is not None:
            scale = ones(self, "router_scale", width) / math.sqrt(width)
            mean = jnp.mean(routed * routed, axis=-1, keepdims=True)
            routed = routed * jax.lax.rsqrt(mean + a.router_norm.eps) * scale[None, None]
        scores = [dot("ble,ex->blx", routed, router, "float32")]
        if a.selection_bias:
            scores.append(matrix(self, "selection_bias", (a.num_experts,), (None,), 0))
        own, rows = ("batch", "length", None), ("routed", "length", None)
        # Each device's own: the partitioner would give every device the scores of all.
        weights, chosen = each_device(functools.partial(choose, a), (own, (None,))[: len(scores)])(*scores)
        if a.expert_scale:
            weights = weights * jnp.take(ones(self, "expert_scale", a.num_experts), chosen)
        # A device has all positions of its rows, and the experts (of those, the hidden units) that lie on it.
        share = each_device(
            functools.partial(_share, compute_dtype=self.exec.compute_dtype, activation=a.activation),
            (rows, rows, rows, ("experts",), ("experts", None, None, "mlp"), ("experts", "mlp", None)),
            summed=("experts", "mlp"),
        )
        numbers = jnp.arange(a.num_experts, dtype=jnp.int32)
        # What moves between devices is rounded before, not after.
        mixed = share(x.astype(self.exec.compute_dtype), weights, chosen, numbers, up, down)
        logits = scores[0] if a.scoring == "softmax" else jax.nn.log_sigmoid(scores[0])
        return mixed, balance(logits, chosen, counted)


def choose(spec: ExpertsSpec, scores: Array, bias: Array | None = None) -> tuple[Array, Array]:
    """Which experts each position uses, and their weights.

    Args:
        scores: float32 [B, L, X].
        bias: float32 [X], the selection bias; None for none.

    Returns:
        Weights float32 [B, L, k] and experts int32 [B, L, k].
    """
    if spec.scoring == "softmax" and spec.normalize and bias is None and spec.num_groups == 1:
        best, chosen = jax.lax.top_k(scores, spec.num_experts_per_token)
        weights = jax.nn.softmax(best, axis=-1)  # over all and divided by the sum of the chosen is the same
        return (weights if spec.scale == 1.0 else weights * spec.scale), chosen
    each = jax.nn.softmax(scores, axis=-1) if spec.scoring == "softmax" else jax.nn.sigmoid(scores)
    ranks = each if bias is None else each + bias[None, None]
    if spec.num_groups > 1:
        groups = ranks.reshape(*ranks.shape[:2], spec.num_groups, -1)
        best = jnp.sum(jax.lax.top_k(groups, min(2, groups.shape[-1]))[0], axis=-1)
        kept = jax.lax.top_k(best, spec.groups_per_token)[1]
        index = jnp.arange(spec.num_groups, dtype=jnp.int32)[None, None, None]
        open_ = jnp.any(kept[..., None] == index, axis=2)
        ranks = jnp.where(open_[..., None], groups, -jnp.inf).reshape(ranks.shape)
    chosen = jax.lax.top_k(ranks, spec.num_experts_per_token)[1]
    weights = jnp.take_along_axis(each, chosen, axis=-1)
    if spec.normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * spec.scale, chosen


def balance(scores: Array, chosen: Array, counted: Array | None = None) -> Array:
    """X times the sum over X experts of the share of choices that fell on each and its mean probability (arXiv
    2101.03961, equations 4 to 6): 1 where both are even, X where all fall on one that is sure of them.

    scores float32 [B, L, X]; chosen int32 [B, L, k]; counted bool [B, L], None for all. The gradient reaches the
    probabilities.
    """
    experts = scores.shape[-1]
    weights = jnp.ones(scores.shape[:2]) if counted is None else counted.astype(jnp.float32)
    weights = (weights / jnp.maximum(jnp.sum(weights), 1.0))[..., None]
    index = jnp.arange(experts, dtype=jnp.int32)[None, None, None]
    shares = jnp.sum(weights * jnp.mean(chosen[..., None] == index, axis=2, dtype=jnp.float32), axis=(0, 1))
    probabilities = jnp.sum(weights * jax.nn.softmax(scores, axis=-1), axis=(0, 1))
    return experts * jnp.sum(shares * probabilities)


def _share(
    x: Array,
    gates: Array,
    chosen: Array,
    numbers: Array,
    up: Array,
    down: Array,
    *,
    compute_dtype: str,
    activation: str,
) -> Array:
    """What the experts with these numbers add to x [B, L, E]; the choices of all are known."""
    here = jnp.clip(chosen - numbers[0], -1, len(numbers))
    here = jnp.where(here < 0, len(numbers), here).reshape(-1, chosen.shape[-1])
    flat = x.reshape(-1, x.shape[-1]), gates.reshape(here.shape)
    return _mixture(*flat, here, up, down, compute_dtype, activation).reshape(x.shape)


class _Blocks(NamedTuple):
    """Choices sorted by expert: `order` [T k]; each expert's begin at `first` and are `count`, its blocks end before
    `ends`, all [X]."""

    order: Array
    first: Array
    count: Array
    ends: Array
    size: int

    def rows(self, j: Array, tokens: int, each: int) -> tuple[Array, Array, Array]:
        """Block j's expert [], choices and positions [size]; beyond the end of both where it isn't full."""
        expert = jnp.sum(self.ends <= j, dtype=jnp.int32)
        begin = self.ends[expert] - -(-self.count[expert] // self.size)
        index = jnp.arange(self.size, dtype=jnp.int32)
        at = (j - begin) * self.size + index
        full = at < self.count[expert]
        choice = self.order[jnp.where(full, self.first[expert] + at, 0)]
        return expert, jnp.where(full, choice, tokens * each + index), jnp.where(full, choice // each, tokens + index)


def _blocks(chosen: Array, experts: int) -> _Blocks:
    """chosen int32 [T, k]: an expert in 0..X-1, or X for one that isn't here."""
    flat = chosen.reshape(-1)
    # A power of two near an eighth of what an expert gets on average: so much is filled up, half a block each.
    size = 1 << max(0, (flat.size // (8 * experts)).bit_length() - 1)
    size = min(size, _BLOCK)
    index = jnp.arange(experts, dtype=jnp.int32)
    count = jnp.sum(flat[:, None] == index[None], axis=0, dtype=jnp.int32)
    first, ends = jnp.cumsum(count) - count, jnp.cumsum(-(-count // size))
    return _Blocks(jnp.argsort(flat, stable=True).astype(jnp.int32), first, count, ends, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _mixture(
    x: Array, gates: Array, chosen: Array, up: Array, down: Array, compute_dtype: str, activation: str
) -> Array:
    """float32 [T, E]: each position's experts, times its gates. x [T, E]; gates, chosen [T, k]; up [X, E, 2, M]."""
    blocks, (tokens, each) = _blocks(chosen, up.shape[0]), chosen.shape
    rounded = up.astype(compute_dtype), down.astype(compute_dtype)

    def add(j, total):
        expert, choice, at = blocks.rows(j, tokens, each)
        inputs = _taken(x, at), _taken(gates.reshape(-1), choice), *(w[expert] for w in rounded)
        found = _expert(*inputs, compute_dtype, activation)
        return _added(total, at, found)

    return jax.lax.fori_loop(0, blocks.ends[-1], add, jnp.zeros(x.shape, jnp.float32))


def _forward(x, gates, chosen, up, down, compute_dtype, activation):
    return _mixture(x, gates, chosen, up, down, compute_dtype, activation), (x, gates, chosen, up, down)


def _backward(compute_dtype, activation, inputs, g):
    x, gates, chosen, up, down = inputs
    blocks, (tokens, each) = _blocks(chosen, up.shape[0]), chosen.shape
    flat, rounded = gates.reshape(-1), (up.astype(compute_dtype), down.astype(compute_dtype))

    def add(j, sums):
        expert, choice, at = blocks.rows(j, tokens, each)
        weights = (w[expert].astype(jnp.float32) for w in rounded)  # so that their gradients are float32
        one = functools.partial(_expert, compute_dtype=compute_dtype, activation=activation)
        _, back = jax.vjp(one, _taken(x, at), _taken(flat, choice), *weights)
        places = at, choice, expert, expert
        return tuple(map(_added, sums, places, back(_taken(g, at))))

    start = tuple(jnp.zeros(a.shape, jnp.float32) for a in (x, flat, up, down))
    d_x, d_gates, d_up, d_down = jax.lax.fori_loop(0, blocks.ends[-1], add, start)
    types = x.dtype, gates.dtype, up.dtype, down.dtype
    d_x, d_gates, d_up, d_down = map(jax.lax.convert_element_type, (d_x, d_gates, d_up, d_down), types)
    return d_x, d_gates.reshape(gates.shape), np.zeros(chosen.shape, jax.dtypes.float0), d_up, d_down


_mixture.defvjp(_forward, _backward)


def _expert(rows: Array, gate: Array, up: Array, down: Array, compute_dtype: str, activation: str) -> Array:
    """rows [r, E], gate [r] -> float32 [r, E]."""
    # Flat: XLA's CPU can't multiply all forms of a bfloat16 product.
    first, second = jnp.split(dot("re,em->rm", rows, up.reshape(up.shape[0], -1), compute_dtype), 2, axis=-1)
    return dot("rm,me->re", gate[:, None] * ACTIVATIONS[activation](first) * second, down, compute_dtype)


def _taken(a: Array, at: Array) -> Array:
    """a[at]; zeros beyond its end."""
    return a.at[at].get(mode="fill", fill_value=0)


def _added(a: Array, at: Array, more: Array) -> Array:
    """a with `more` added at `at`, where no place stands twice; what is beyond the end is dropped."""
    return a.at[at].add(more, mode="drop", unique_indices=True)
