"""The one matrix product: bfloat16 factors, float32 sums, forward and backward."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def dot(spec: str, a: Array, b: Array, products: str = "bfloat16") -> Array:
    """einsum(spec, a, b) with factors rounded to `products` and a float32 result.

    Asking for a float32 result matters even on a CPU: without it XLA sums in bfloat16 and at a fraction of the speed.
    So does asking for float32 factors on TPUs and GPUs, which else round them to bfloat16 or TF32.
    Cotangents are rounded alike, or half of the backward pass would run at float32's speed.
    spec: an index of one factor must occur in the other or in the result; no ellipsis.
    """
    return _product(spec, a, b, products)


def _product(spec: str, a: Array, b: Array, products: str) -> Array:
    a, b = a.astype(products), b.astype(products)
    precision = jax.lax.Precision.HIGHEST if products == "float32" else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


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
