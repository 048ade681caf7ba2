"""The one product: rounding of its factors, float32 sums, and its gradients."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm import sharding
from diffusion_lm.nn.dot import dot

SPECS = {
    "ble,ehd->blhd": ((2, 5, 8), (8, 3, 4)),
    "blhd,hde->ble": ((2, 5, 3, 4), (3, 4, 8)),
    "bgrqd,bgdk->bgrqk": ((2, 2, 3, 5, 4), (2, 2, 4, 7)),
    "blv,ble->ve": ((2, 5, 11), (2, 5, 8)),
    "ble,ve->blv": ((2, 5, 8), (11, 8)),
}


@pytest.fixture(params=SPECS)
def case(request):
    rng = np.random.default_rng(0)
    return request.param, *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SPECS[request.param])


def exact(spec, a, b):
    return np.einsum(spec, np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize(("compute_dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_value(case, compute_dtype, tolerance):
    spec, a, b = case
    out = dot(spec, a, b, compute_dtype)
    assert out.dtype == jnp.float32
    bound = exact(spec, abs(a), abs(b))  # each product is off by its factors' rounding
    assert (abs(out - exact(spec, a, b)) <= tolerance * bound + 1e-6).all()


def test_sums_are_float32(case):
    """Factors that bfloat16 holds give exact sums, where bfloat16 sums would not."""
    spec, a, b = case
    a, b = jnp.round(a * 20), jnp.round(b * 20)
    assert (dot(spec, a, b) == exact(spec, a, b)).all()


@pytest.mark.parametrize(("compute_dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gradients(case, compute_dtype, tolerance):
    spec, a, b = case
    weights = jnp.asarray(np.random.default_rng(1).normal(size=exact(spec, a, b).shape), jnp.float32)
    ours = jax.grad(lambda a, b: jnp.sum(weights * dot(spec, a, b, compute_dtype)), argnums=(0, 1))(a, b)
    theirs = jax.grad(lambda a, b: jnp.sum(weights * jnp.einsum(spec, a, b)), argnums=(0, 1))(a, b)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == jnp.float32 and one.shape == other.shape
        assert abs(one - other).max() <= tolerance * abs(other).max()


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize(
    ("spec", "shapes", "copied"),
    [
        ("ble,ecm->blcm", ((2, 128, 8), (8, 2, 3)), True),
        ("ble,ecm->blcm", ((1, 255, 8), (8, 2, 3)), False),  # too few rows
        ("bgqd,bgdk->bgqk", ((2, 2, 256, 4), (2, 2, 4, 7)), False),  # many small products
    ],
    ids=["many rows", "few rows", "batched"],
)
def test_a_cpu_without_bfloat16_units_multiplies_float32_copies(spec, shapes, copied, units, monkeypatch):
    """With the same sums, forward and backward."""
    monkeypatch.setattr(sys.modules["diffusion_lm.nn.dot"], "bfloat16_units", lambda: units)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    rounded = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (a, b)]
    np.testing.assert_allclose(dot(spec, a, b), np.einsum(spec, *rounded), atol=2e-5)
    program = jax.jit(lambda a, b: dot(spec, a, b)).lower(a, b).as_text()
    (product,) = re.findall(r"dot_general.*", program)
    assert ("bf16" in product) == (units or not copied)


def test_processors_with_and_without_bfloat16_units(monkeypatch):
    def found(text):
        monkeypatch.setattr(sharding.Path, "exists", lambda self: text is not None)
        monkeypatch.setattr(sharding.Path, "read_text", lambda self: text)
        return sharding.bfloat16_units.__wrapped__()

    assert not found("vendor_id : GenuineIntel\nflags : fma avx512f avx512_bf16\n")
    assert found("vendor_id : GenuineIntel\nflags : fma avx512f avx512_bf16 amx_bf16 amx_tile\n")
    assert found("vendor_id : AuthenticAMD\nflags : fma avx512f avx512_bf16\n")
    assert not found("vendor_id : AuthenticAMD\nflags : fma avx2\n")
    assert found("CPU implementer : 0x41\nFeatures : fp asimd bf16\n") and found(None)


@pytest.mark.parametrize("span", [(0, 5), (1, 4), (0, 2), (5, 5)])
def test_a_gradient_of_some_positions(span):
    """The value and the other factor's gradient stay; the gradient is zero outside of the span."""
    spec, (a, b) = "ble,ecm->blcm", (jnp.asarray(small, jnp.float32) for small in _drawn((2, 5, 8), (8, 3, 4)))
    of = lambda span: jax.value_and_grad(  # noqa: E731
        lambda a, b: jnp.sum(dot(spec, a, b, "float32", "none", span) ** 2), argnums=(0, 1)
    )(a, b)
    (ours, (da, db)), (theirs, (all_a, all_b)) = of(span), of(None)
    inside = (jnp.arange(5) >= span[0]) & (jnp.arange(5) < span[1])
    np.testing.assert_array_equal(da, jnp.where(inside[None, :, None], all_a, 0.0))
    np.testing.assert_array_equal(db, all_b)
    assert ours == theirs


def _drawn(*shapes):
    rng = np.random.default_rng(2)
    return [rng.normal(size=shape) for shape in shapes]


def test_gradients_have_the_types_of_the_factors(case):
    spec, a, b = case
    da, db = jax.grad(lambda a, b: dot(spec, a, b).sum(), argnums=(0, 1))(a, b.astype(jnp.bfloat16))
    assert da.dtype == jnp.float32 and db.dtype == jnp.bfloat16


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ["ble,ehd->blhd", "ble,ve->blv"])
def test_one_row_is_the_row_of_two(spec, compute_dtype):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 1, 8), SPECS[spec][1]))
    np.testing.assert_allclose(
        dot(spec, a[:1], b, compute_dtype), dot(spec, a, b, compute_dtype)[:1], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("compute_dtype", "asked"), [("float32", ["HIGHEST", "HIGHEST"]), ("bfloat16", ["DEFAULT", "DEFAULT"])]
)
def test_float32_is_asked_for(case, compute_dtype, asked):
    """Forward and backward: a TPU would round factors to bfloat16, a GPU to TF32. A CPU's numbers can't tell."""
    spec, a, b = case
    text = (
        jax.jit(jax.grad(lambda a, b: dot(spec, a, b, compute_dtype).sum() ** 2, argnums=(0, 1))).lower(a, b).as_text()
    )
    found = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", text)
    assert len(found) == 3 and all(list(one) == asked for one in found)
