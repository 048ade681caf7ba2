"""The formula against the products that a traced network really has."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from support.small import module_of

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal, Full
from diffusion_lm.models import flops
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.transformer import init_params
from diffusion_lm.types import Batch

MODULE = module_of(DenoiserSpec(width=32, layers=3, heads=4, kv_heads=2, mlp_dim=48), 100, scan=False)
ROWS, LENGTH = 2, 16


def traced(function, *arguments) -> int:
    """Two for each multiplication in a function's products, loops unrolled."""
    return sum(map(_operations, jax.make_jaxpr(function)(*arguments).jaxpr.eqns))


def _operations(equation) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
    return sum(_operations(e) for jaxpr in inner for e in getattr(jaxpr, "eqns", ()))


def one_pass(attention):
    tokens = jnp.zeros((ROWS, 2 * LENGTH if isinstance(attention, BlockDiffusionTraining) else LENGTH), jnp.int32)
    positions = jnp.zeros((ROWS, LENGTH), jnp.int32)

    def read(key):
        params = init_params(MODULE, key)
        found = MODULE.apply(
            {"params": params}, tokens, jnp.zeros((ROWS, 1)), attention=attention, positions=positions
        )[0]
        return [one.logits() for one in (found if isinstance(found, tuple) else (found,))]

    return traced(read, jax.random.key(0))


def test_a_pass_that_sees_everything():
    padding = 2 * ROWS * LENGTH * 32 * (MODULE.vocabulary.rows - MODULE.vocabulary.size)
    setup = traced(lambda key: init_params(MODULE, key), jax.random.key(0))
    found = one_pass(Full()) - padding - setup
    assert flops.of_pass(MODULE, rows=ROWS, length=LENGTH, attention=Full()) == found


@pytest.mark.parametrize(
    ("attention", "pairs"),
    [
        (Causal(), LENGTH * (LENGTH + 1) // 2),
        (BlockCausal(4), 4 * (4 + 8 + 12 + 16)),
        (BlockCausal(LENGTH), LENGTH**2),
        (BlockCausal(10), 10 * 10 + 6 * 16),
    ],
)
def test_pairs_that_see_each_other(attention, pairs):
    whole, part = (flops.of_pass(MODULE, rows=ROWS, length=LENGTH, attention=r) for r in (Full(), attention))
    assert whole - part == 4 * ROWS * (LENGTH**2 - pairs) * 3 * 32


def test_a_cache_is_seen_by_all_and_logits_may_be_of_one():
    plain = flops.of_pass(MODULE, rows=1, length=4, attention=Causal())
    assert flops.of_pass(MODULE, rows=1, length=4, attention=Causal(), past=10) - plain == 4 * 4 * 10 * 3 * 32
    one = flops.of_pass(MODULE, rows=1, length=4, attention=Causal(), num_logits=1)
    assert plain - one == 2 * 3 * 32 * MODULE.vocabulary.size


def test_an_update_is_what_its_objective_asks_for_three_times():
    asked = BlockDiffusionTraining(4, Causal())
    number, truth = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32), jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_)
    batch = Batch(tokens=number, segment_ids=number, positions=number, context_mask=truth, loss_mask=truth)

    def objective(denoise, teacher, key, batch):
        tokens = jnp.concatenate([batch.tokens, batch.tokens], axis=1)
        where = {"positions": batch.positions, "segment_ids": batch.segment_ids}
        noisy, _ = denoise(tokens, jnp.zeros((ROWS, 1)), attention=asked, **where)
        return noisy.logits()

    one = flops.of_pass(MODULE, rows=ROWS, length=LENGTH, attention=asked)
    assert flops.of_update(MODULE, objective, batch) == 3 * one
    clean = flops.of_pass(MODULE, rows=ROWS, length=LENGTH, attention=Causal())
    blocks = flops.of_pass(MODULE, rows=ROWS, length=LENGTH, attention=BlockCausal(4))
    assert one == clean + blocks  # a noisy position sees its block and the clean ones before it


def test_what_is_read_without_a_gradient_is_counted_once():
    """A teacher; and, of a network that is told what it said, a first reading of every second batch."""
    number, truth = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32), jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_)
    batch = Batch(tokens=number, segment_ids=number, positions=number, context_mask=truth, loss_mask=truth)

    def asks(*readers):
        def objective(denoise, teacher, key, batch):
            where = {"positions": batch.positions, "segment_ids": batch.segment_ids, "attention": Full()}
            return [(denoise, teacher)[reader](batch.tokens, jnp.zeros((ROWS, 1)), **where) for reader in readers]

        return objective

    told = MODULE.clone(spec=dataclasses.replace(MODULE.spec, self_conditioning=True))
    one = flops.of_pass(MODULE, rows=ROWS, length=LENGTH, attention=Full())
    mean = 2 * ROWS * LENGTH * 32 * MODULE.vocabulary.size
    assert flops.of_update(MODULE, asks(0, 1, 1), batch) == (3 + 2) * one
    assert flops.of_update(told, asks(0, 1), batch) == (3 + 1) * one + (one + mean) // 2
