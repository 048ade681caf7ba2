"""A mixture of experts against a loop over experts, by hand."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small import FLOAT32, MASK, VOCAB, bound, extend, module_of, read, rows

from diffusion_lm.attention_patterns import Causal, Full
from diffusion_lm.models import flops
from diffusion_lm.models.base import DenoiserSpec, Execution
from diffusion_lm.nn.moe import Experts, balance, choose
from diffusion_lm.nn.specs import ExpertsSpec
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.sharding import AXES, RULES
from diffusion_lm.training.state import initial
from diffusion_lm.training.step import make_step
from diffusion_lm.types import Batch, Loss

MIXED = DenoiserSpec(width=16, layers=2, heads=2, mlp_dim=6, num_experts=5, num_experts_per_token=2)


def experts(spec, exec=FLOAT32):
    return Experts(spec.groups[0].layer.mlp, exec)


def params_of(spec, lean=0.0):
    """Random; `lean` draws all positions towards the first experts."""
    a, rng = spec, np.random.default_rng(0)
    shapes = {"router": (a.width, a.num_experts), "gate_up": (a.num_experts, a.width, 2, a.mlp_dim),
              "down": (a.num_experts, a.mlp_dim, a.width)}  # fmt: skip
    params = {name: rng.normal(scale=0.3, size=shape).astype("f4") for name, shape in shapes.items()}
    params["router"][0] -= lean * np.arange(a.num_experts)
    return params


def inputs(length=37):
    x = np.random.default_rng(1).normal(size=(2, length, MIXED.width)).astype("f4")
    x[..., 0] = abs(x[..., 0])
    return jnp.asarray(x)


def one_by_one(params, x, k):
    """Chain expert reads every position; all but the k best scored count nothing."""
    scores = jnp.einsum("ble,ex->blx", x, params["router"])
    best, chosen = jax.lax.top_k(scores, k)
    gates = jax.nn.softmax(best, axis=-1)
    total = 0.0
    for i in range(scores.shape[-1]):
        first, second = jnp.moveaxis(jnp.einsum("ble,ecm->blcm", x, params["gate_up"][i]), 2, 0)
        said = jnp.einsum("blm,me->ble", jax.nn.silu(first) * second, params["down"][i])
        total += jnp.sum(jnp.where(chosen == i, gates, 0.0), axis=-1, keepdims=True) * said
    return total


def mixture(spec):
    return jax.jit(lambda params, x: experts(spec).apply({"params": params}, x))


@pytest.mark.parametrize(("length", "lean"), [(37, 0.0), (37, 9.0), (1, 0.0)], ids=["spread", "on two", "a token"])
def test_it_is_the_loop_over_experts_forward_and_backward(length, lean):
    """However unevenly positions choose: none is turned away."""
    params, x = params_of(MIXED, lean), inputs(length)
    g = jnp.asarray(np.random.default_rng(2).normal(size=x.shape).astype("f4"))

    def both(function):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(g * function(p, x)), argnums=(0, 1)))(params, x)

    found = both(lambda p, x: experts(MIXED).apply({"params": p}, x)[0])
    expected = both(lambda p, x: one_by_one(p, x, MIXED.num_experts_per_token))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected)


def test_bfloat16_products_are_near_those_of_float32():
    """Forward and backward; positions choose as before, as scores stay float32."""
    params, x = params_of(MIXED), inputs()
    g = jnp.asarray(np.random.default_rng(2).normal(size=x.shape).astype("f4"))

    def both(compute_dtype):
        layer = experts(MIXED, Execution(compute_dtype=compute_dtype))
        said, back = jax.vjp(jax.jit(lambda p, x: layer.apply({"params": p}, x)[0]), params, x)
        return said, *back(g)

    for found, expected in zip(*map(jax.tree.leaves, map(both, ("bfloat16", "float32"))), strict=True):
        assert found.dtype == jnp.float32
        error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
        assert 0 < error < 1e-2


def test_sampling_chooses_experts_in_float32():
    """As training does: rounded scores would send positions to other experts."""
    net = bound(MIXED)
    net = net.replace(module=net.module.clone(exec=Execution()))
    layer = net.for_sampling().params["layer_1"]["experts"]
    np.testing.assert_array_equal(layer["router"], net.params["layers"]["experts"]["router"][1])
    assert {name: a.dtype.name for name, a in layer.items() if name != "router"} == dict.fromkeys(
        ("gate_up", "down"), "bfloat16"
    )


def test_all_experts_with_equal_gates_are_their_average():
    every = dataclasses.replace(MIXED, num_experts_per_token=MIXED.num_experts)
    params, x = params_of(every) | {"router": np.zeros((every.width, every.num_experts), "f4")}, inputs()
    alone = [
        mixture(dataclasses.replace(MIXED, num_experts=1, num_experts_per_token=1))(
            {name: a[:, i : i + 1] if name == "router" else a[i : i + 1] for name, a in params.items()}, x
        )[0]
        for i in range(every.num_experts)
    ]
    np.testing.assert_allclose(mixture(every)(params, x)[0], np.mean(alone, axis=0), atol=1e-5)


def test_the_balance_is_least_where_all_experts_are_used_alike():
    """One choice a position: 1 where both choices and probabilities are even, as many as there are experts where all
    fall on one; and its gradient leads from here to there."""
    even = 3.0 * jnp.eye(4)[jnp.arange(40, dtype=jnp.int32) % 4][None]
    uneven = even.at[:, ::2, 0].add(4.0)

    @jax.jit
    def cost(scores):
        return balance(scores, jax.lax.top_k(scores, 1)[1])

    np.testing.assert_allclose(cost(even), 1.0, rtol=1e-6)
    np.testing.assert_allclose(cost(20.0 * jnp.eye(4)[jnp.zeros(40, jnp.int32)][None]), 4.0, rtol=1e-3)
    way = jax.grad(cost)(uneven)
    assert cost(uneven) > cost(uneven - way / jnp.abs(way).max())


def test_with_a_cache_it_says_what_it_says_without():
    net = bound(MIXED)
    sampling, tokens = net.for_sampling(), rows(9)
    full = read(net, tokens, Causal())
    said, cache = extend(sampling, sampling.empty_cache(2, 9), tokens[:, :5], jnp.full(2, 5), Causal())
    np.testing.assert_allclose(said, full[:, :5], atol=2e-5)
    for at in range(5, 9):
        said, cache = extend(sampling, cache, tokens[:, at : at + 1], jnp.ones(2, jnp.int32), Causal())
        np.testing.assert_allclose(said[:, 0], full[:, at], atol=2e-5)


def a_batch():
    tokens = rows(16)
    at = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32)[None], tokens.shape)
    return Batch(tokens=tokens, segment_ids=jnp.ones_like(tokens), positions=at, context_mask=at == 0, loss_mask=at > 0)


def test_a_joint_pass_has_one_penalty():
    """Of two layers, of which each is about 1 at the least; layers one by one have the same."""

    @jax.jit
    def losses(net):
        return Joint(block_size=4)(net.denoise, Absorbing(mask=MASK), jax.random.key(1), a_batch())

    net = bound(MIXED)
    stacked, apart = losses(net), losses(net.for_sampling())
    assert stacked["causal"].aux_loss is None
    price = stacked["canvas"].aux_loss / stacked["canvas"].weight
    assert 1.9 < price / MIXED.router_aux_loss_weight < 2 * MIXED.num_experts
    np.testing.assert_allclose(apart["canvas"].aux_loss, stacked["canvas"].aux_loss, rtol=1e-5)


def test_padding_has_no_part_in_the_penalty():
    whole = a_batch()
    inside = jnp.arange(16, dtype=jnp.int32)[None] < 11
    batch = whole.replace(segment_ids=whole.segment_ids * inside, loss_mask=whole.loss_mask & inside)

    @jax.jit
    def aux_loss(net, tokens):
        parts = Joint(block_size=4)(net.denoise, Absorbing(mask=MASK), jax.random.key(1), batch.replace(tokens=tokens))
        return parts["canvas"].aux_loss

    net = bound(MIXED)
    others = jnp.where(inside, batch.tokens, (batch.tokens + 1) % VOCAB)
    np.testing.assert_allclose(aux_loss(net, others), aux_loss(net, batch.tokens), rtol=1e-6)


def test_training_minimises_the_penalty_and_reports_it_beside_the_loss():
    def loss(params, key, batch, constants):
        return {"part": Loss(sum=4.0 * params, weight=jnp.float32(2.0), aux_loss=2.0 * params**2)}

    step = make_step(loss, optax.sgd(1.0), lambda _: 1.0)
    state = initial(lambda _: jnp.float32(3.0), optax.sgd(1.0), False, jax.random.key(0))
    after, metrics = step(state, jax.random.key(0), None, ())
    assert float(after.params) == 3.0 - (4.0 + 2 * 2 * 3.0) / 2
    assert (float(metrics["loss"]), float(metrics["aux_loss"])) == (6.0, 9.0)


def test_operations_count_the_experts_that_are_chosen():
    def needed(**sizes):
        module = module_of(dataclasses.replace(MIXED, **sizes))
        return flops.of_pass(module, rows=2, length=8, attention=Full())

    dense = needed(num_experts=0, num_experts_per_token=0, mlp_dim=2 * MIXED.mlp_dim)
    router = 2 * 2 * 8 * MIXED.layers * MIXED.width * MIXED.num_experts
    assert needed() == dense + router
    assert needed(num_experts=10) == dense + 2 * router


def test_every_parameter_has_a_place_on_the_mesh():
    boxed = jax.eval_shape(lambda: experts(MIXED).init(jax.random.key(0), inputs()))["params"]
    axes = {name: leaf.names for name, leaf in boxed.items()}
    assert axes["gate_up"][0] == axes["down"][0] == "experts"
    assert all(isinstance(leaf, nn.Partitioned) for leaf in boxed.values())


@pytest.mark.parametrize(
    "bad",
    [
        {"num_experts": 4},
        {"num_experts": 2, "num_experts_per_token": 3},
        {"num_experts_per_token": 1},
        {"num_experts": -1},
    ],
)
def test_choices_that_can_not_be_are_refused(bad):
    with pytest.raises(ValueError, match=r"model\.num_experts_per_token"):
        DenoiserSpec(**bad)


def test_positions_move_rounded_and_are_added_up_once_each_way():
    """On four devices: what experts add to them in float32, its gradient rounded like any factor; not the gradient of
    that sum, which all devices have. Weights' gradients are summed in float32, and choices are made of one's own rows.
    """
    a = dataclasses.replace(MIXED, mlp_dim=8, num_experts=8)
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    x = jnp.zeros((8, 4, a.width))

    def gradients(params, x, g):
        return jax.vjp(lambda *both: experts(a, Execution()).apply({"params": both[0]}, both[1])[0], params, x)[1](g)

    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        text = str(jax.make_jaxpr(gradients)(params_of(a), x, x))
    assert re.findall(r"(\w+)\[4,4,16\] = psum", text) == ["f32", "bf16"]
    assert re.findall(r"(\w+)\[4,(?:16,2,8|8,16)\] = psum", text) == ["f32", "f32"]
    assert re.findall(r"f32\[(\S+)\] \S+ = top_k", text) == ["2,4,2"]


def chosen_by_hand(spec, scores, bias):
    """{expert: weight} of one position, float64."""
    each = np.exp(scores) / np.exp(scores).sum() if spec.scoring == "softmax" else 1 / (1 + np.exp(-scores))
    groups = (each + bias).reshape(spec.num_groups, -1)
    best = sorted(range(spec.num_groups), key=lambda g: -sum(sorted(groups[g])[-2:]))[: spec.groups_per_token]
    allowed = [x for x in range(spec.num_experts) if x // groups.shape[1] in best]
    found = sorted(allowed, key=lambda x: -(each + bias)[x])[: spec.num_experts_per_token]
    total = sum(each[x] for x in found) if spec.normalize else 1.0
    return {x: spec.scale * each[x] / total for x in found}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_experts_are_chosen_as_by_hand(scoring, normalize, grouped):
    groups = {"num_groups": 4, "groups_per_token": 2} if grouped else {}
    spec = ExpertsSpec(dim=1, num_experts=12, num_experts_per_token=3, scoring=scoring, normalize=normalize,
                       scale=2.5, selection_bias=grouped, **groups)  # fmt: skip
    rng = np.random.default_rng(3)
    scores, bias = rng.normal(size=(2, 9, 12)), grouped * rng.normal(scale=0.3, size=12)
    weights, chosen = choose(spec, *map(jnp.float32, (scores, bias)[: 1 + grouped]))
    for at in np.ndindex(2, 9):
        expected = chosen_by_hand(spec, scores[at], bias)
        assert sorted(expected) == sorted(np.asarray(chosen[at]))
        for expert, weight in zip(np.asarray(chosen[at]), np.asarray(weights[at]), strict=True):
            assert abs(expected[expert] - weight) < 1e-5


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ({"num_experts_per_token": 9}, r"must lie in 1\.\.8"),
        ({"num_groups": 3}, "groups are of one size"),
        ({"num_groups": 4, "groups_per_token": 5}, "groups are of one size"),
        ({"num_groups": 4, "groups_per_token": 1, "num_experts_per_token": 3}, "hold fewer than 3"),
    ],
)
def test_groups_that_can_not_be_are_refused(bad, cause):
    with pytest.raises(ValueError, match=cause):
        ExpertsSpec(**({"dim": 1, "num_experts": 8, "num_experts_per_token": 2} | bad))
