"""The one matrix product: bfloat16 factors, float32 sums, forward and backward."""

import functools
import math

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def dot(spec: str, a: Array, b: Array, products: str = "bfloat16") -> Array:
    """einsum(spec, a, b) with factors rounded to `products` and a float32 result.

    Asking for a float32 result matters even on a CPU: without it XLA sums in bfloat16 and at a fraction of the speed.
    Cotangents are rounded alike, or half of the backward pass would run at float32's speed.
    spec: an index of one factor must occur in the other or in the result; no ellipsis.
    """
    return _product(spec, a, b, products)


def _product(spec: str, a: Array, b: Array, products: str) -> Array:
    a, b = a.astype(products), b.astype(products)
    # XLA's CPU backend runs a bfloat16 matrix-vector product at a tenth of the speed of two rows.
    if products == "bfloat16" and jax.default_backend() == "cpu" and _rows(spec, a) == 1:
        return _product(spec, jnp.concatenate([a, a]), b, products)[:1]
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _rows(spec: str, a: Array) -> int:
    """How many rows meet a matrix b; 0 where b is not one or rows don't lead: then nothing can be doubled."""
    left, right, result = _indices(spec)
    if set(left) & set(right) & set(result) or left[0] in right or result[0] != left[0]:
        return 0
    return math.prod(size for index, size in zip(left, a.shape, strict=True) if index not in right)


def _indices(spec: str) -> tuple[str, str, str]:
    factors, result = spec.split("->")
    left, right = factors.split(",")
    return left, right, result


def _forward(spec, a, b, products):
    rounded = a.astype(products), b.astype(products)
    types = jnp.zeros((), a.dtype), jnp.zeros((), b.dtype)  # residuals are arrays: the factors' types ride along as two
    return _product(spec, *rounded, products), (*rounded, *types)


def _backward(spec, products, residuals, g):
    a, b, like_a, like_b = residuals
    left, right, result = _indices(spec)
    da = _product(f"{result},{right}->{left}", g, b, products)
    db = _product(f"{left},{result}->{right}", a, g, products)
    return da.astype(like_a.dtype), db.astype(like_b.dtype)


dot.defvjp(_forward, _backward)
