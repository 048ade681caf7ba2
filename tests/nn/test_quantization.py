"""Products of int8 factors, and a network whose layers have them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small import FLOAT32, bound, read, rows

from diffusion_lm.attention_patterns import Full
from diffusion_lm.models.base import DenoiserSpec, Execution, check_execution
from diffusion_lm.nn.dot import dot

PLAIN = DenoiserSpec(width=16, layers=1, heads=2, mlp_dim=24)
SPECS = {
    "ble,ehd->blhd": ((2, 5, 8), (8, 3, 4)),
    "ble,ecgd->blcgd": ((2, 5, 8), (8, 2, 3, 4)),
    "blm,me->ble": ((2, 5, 6), (6, 8)),
    "bgrqd,bgdk->bgrqk": ((2, 2, 3, 5, 4), (2, 2, 4, 7)),
    "me,ble->lbm": ((6, 8), (2, 5, 8)),
}
_int8 = jax.jit(lambda spec, a, b, compute_dtype: dot(spec, a, b, compute_dtype, "int8"), static_argnums=(0, 3))


def exact(spec, a, b):
    return np.einsum(spec, np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.fixture(params=SPECS)
def factors(request):
    """Of rows and columns of very different sizes."""
    rng = np.random.default_rng(0)
    shapes = SPECS[request.param]
    return request.param, *(
        jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape)), jnp.float32) for shape in shapes
    )


def largest(spec, a, b):
    """The largest of either factor in each sum, laid over the factor."""
    found = []
    for indices, x in zip(spec.split("->")[0].split(","), (a, b), strict=True):
        summed = tuple(axis for axis, index in enumerate(indices) if index not in spec.split("->")[1])
        found.append(np.broadcast_to(np.max(np.abs(x), axis=summed, keepdims=True), x.shape).astype(np.float64))
    return found


@pytest.mark.parametrize(("compute_dtype", "rounding"), [("float32", 2**-24), ("bfloat16", 2**-8)])
def test_int8_is_off_by_half_a_step_a_factor(factors, compute_dtype, rounding):
    """Each factor by half of a 127th of the largest, and by its rounding to `products` before: a sum by no more than
    |a| e_b + e_a |b| + e_a e_b."""
    spec, a, b = factors
    error_a, error_b = (
        most * (1 + rounding) / 254 + rounding * np.abs(x) for most, x in zip(largest(spec, a, b), (a, b), strict=True)
    )
    most = exact(spec, abs(a) + error_a, abs(b) + error_b) - exact(spec, abs(a), abs(b))
    off = abs(_int8(spec, a, b, compute_dtype) - exact(spec, a, b))
    assert (off <= most * (1 + 1e-5)).all()
    assert off.max() > 1e-3  # it does round


def test_int8_sums_are_exact(factors):
    """Steps of 1, where each sum has a factor of 127."""
    spec, *drawn = factors
    whole = [np.array(jnp.clip(jnp.round(x * 40), -127, 127)) for x in drawn]
    for indices, x in zip(spec.split("->")[0].split(","), whole, strict=True):
        x[tuple(slice(None) if index in spec.split("->")[1] else 0 for index in indices)] = 127
    assert (_int8(spec, *map(jnp.asarray, whole), "bfloat16") == exact(spec, *whole)).all()


def test_the_gradients_are_those_of_products_that_are_not_quantized(factors):
    spec, a, b = factors
    g = jnp.asarray(np.random.default_rng(1).normal(size=exact(spec, a, b).shape), jnp.float32)
    ours, theirs = (
        jax.vjp(lambda a, b, how=how: dot(spec, a, b, "bfloat16", how), a, b)[1](g) for how in ("int8", "none")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_weights_that_were_rounded_beforehand_are_the_same_steps():
    """What is trained is what writes: `Bound.for_sampling` rounds matrices to bfloat16."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 300), (300, 8)))
    early = [x.astype(jnp.bfloat16) for x in (a, b)]
    np.testing.assert_array_equal(_int8("ij,jk->ik", a, b, "bfloat16"), _int8("ij,jk->ik", *early, "bfloat16"))


def test_int8_of_nothing_is_nothing_and_of_what_is_not_finite_neither():
    a = jnp.asarray([[0.0, 0.0], [1e-45, 0.0], [jnp.nan, 1.0], [1.0, jnp.inf], [1.0, 2.0]])
    b = jnp.asarray([[3.0, 0.0], [-4.0, 0.0]])
    found, back = jax.vjp(lambda a, b: dot("ij,jk->ik", a, b, "bfloat16", "int8"), a, b)
    assert (found[:2] == 0).all() and not jnp.isfinite(found[2:4]).any() and jnp.isfinite(found[4]).all()
    assert jnp.isfinite(back(jnp.ones_like(found))[0]).all()


def test_int8_refuses_sums_that_int32_does_not_hold():
    def of(terms):
        return jax.eval_shape(lambda a: dot("ij,jk->ik", a, a.T, "bfloat16", "int8"), jnp.zeros((1, terms)))

    assert of(133_144).shape == (1, 1)
    with pytest.raises(
        ValueError, match=r"^ij,jk->ik sums 133145 products of int8 factors; int32 holds 133144 at most"
    ):
        of(133_145)


def test_a_network_in_int8_says_nearly_what_it_says_otherwise_and_learns():
    """Its layers' products are really of int8 factors: query, key and value, output, gate and up, down."""
    plain = bound(PLAIN)
    module = plain.module.clone(exec=dataclasses.replace(FLOAT32, quantization="int8"))

    def loss(params, net):
        logits = read(net.replace(params=params), rows(8), Full())
        said = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(said, rows(8, seed=1)[..., None], axis=-1)), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (before, said), gradient = step(plain.params, plain.replace(module=module))
    _, other = loss(plain.params, plain)
    assert 1e-4 < jnp.sqrt(jnp.mean((said - other) ** 2) / jnp.mean(other**2)) < 0.03
    assert str(step.trace(plain.params, plain.replace(module=module)).jaxpr).count("preferred_element_type=int32") == 5
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(gradient))
    square = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))
    stepped = jax.tree.map(lambda a, g: a - 0.02 * g, plain.params, gradient)
    (after, _), _ = step(stepped, plain.replace(module=module))
    assert after < before - 0.01 * square


@pytest.mark.parametrize(("kind", "experts"), [("int4", 0), ("int8", 2)])
def test_a_quantization_that_is_not_implemented_is_refused(kind, experts):
    spec = DenoiserSpec(num_experts=experts, num_experts_per_token=experts)
    with pytest.raises(ValueError, match=r"^exec\.quantization=int. is[^\n]*set [^\n]*none"):
        check_execution(spec, Execution(quantization=kind))
