"""The one way to create a weight matrix, and the one matrix product: bfloat16 factors and float32 sums, forward and
backward; forward, optionally, int8 factors."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.sharding import bfloat16_units, devices_in_force, platform

Array = jax.Array
_STEPS = 127  # int8's largest number: as many steps on either side of zero
_TERMS = (2**31 - 1) // _STEPS**2  # so many products of two such numbers an int32 holds
_ROWS, _COPIED = 256, 2**24  # the fewest rows and the most numbers of a factor that is copied


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> Array:
    """A float32 parameter drawn from N(0, 1 / fan_in), or zeros for fan_in 0, with named axes."""
    init = nn.initializers.normal(1 / math.sqrt(fan_in)) if fan_in else nn.initializers.zeros
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def ones(module: nn.Module, name: str, size: int) -> Array:
    """A float32 vector of factors that begin as 1."""
    return module.param(name, nn.with_logical_partitioning(nn.initializers.ones, (None,)), (size,), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def dot(
    spec: str,
    a: Array,
    b: Array,
    compute_dtype: str = "bfloat16",
    quantization: str = "none",
    span: tuple[int, int] | None = None,
) -> Array:
    """einsum(spec, a, b) with factors rounded to `compute_dtype` and a float32 result.

    Asking for a float32 result matters even on a CPU: without it XLA sums in bfloat16 and at a fraction of the speed.
    So does asking for float32 factors on TPUs and GPUs, which else round them to bfloat16 or TF32.
    Cotangents are rounded alike, or half of the backward pass would run at float32's speed.
    spec: an index of one factor must occur in the other or in the result; no ellipsis.
    quantization: "int8" rounds the factors, after that, to a 127th of their largest value in the sum that they go into,
    and sums exactly, in int32; the gradient is that of "none" (straight-through, arXiv 1308.3432). What isn't finite
    stays so. ValueError for a sum of more terms than int32 holds.
    span: along a's second axis, where its gradient is wanted; it is zero elsewhere, at no cost. None: everywhere.
    """
    return _value(spec, a, b, compute_dtype, quantization)


def _value(spec: str, a: Array, b: Array, compute_dtype: str, quantization: str) -> Array:
    return (_quantized if quantization == "int8" else _product)(spec, a, b, compute_dtype)


def _product(spec: str, a: Array, b: Array, compute_dtype: str) -> Array:
    a, b = a.astype(compute_dtype), b.astype(compute_dtype)
    if compute_dtype == "bfloat16" and _faster_in_float32(spec, a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)  # the same factors and sums
    precision = jax.lax.Precision.HIGHEST if compute_dtype == "float32" else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _faster_in_float32(spec: str, a: Array, b: Array) -> bool:
    """Whether a CPU multiplies float32 copies of bfloat16 factors faster: where its bfloat16 units are slow or missing,
    so many rows share each weight that the copies pay, and they need little memory. Not on a mesh: devices would send
    one another the copies, and what they send would depend on the processor."""
    left, right, result = _indices(spec)
    rows = math.prod(size for index, size in zip(left, a.shape, strict=True) if index in result and index not in right)
    batched = any(index in right and index in result for index in left)
    pays = rows >= _ROWS and not batched and max(a.size, b.size) <= _COPIED
    return pays and platform() == "cpu" and devices_in_force() == 1 and not bfloat16_units()


def _quantized(spec: str, a: Array, b: Array, compute_dtype: str) -> Array:
    left, right, result = _indices(spec)
    terms = [size for index, size in zip(left, a.shape, strict=True) if index not in result]
    if math.prod(terms) > _TERMS:
        raise ValueError(f"{spec} sums {math.prod(terms)} products of int8 factors; int32 holds {_TERMS} at most")
    (a, step_a), (b, step_b) = _steps(a, left, result, compute_dtype), _steps(b, right, result, compute_dtype)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.int32).astype(jnp.float32) * step_a * step_b


def _steps(a: Array, indices: str, result: str, compute_dtype: str) -> tuple[Array, Array]:
    """int8, how many steps each number is, and float32, what a step is, laid out to be multiplied with the result."""
    kind = jnp.finfo(compute_dtype)
    a = jax.lax.reduce_precision(a.astype(jnp.float32), kind.nexp, kind.nmant)  # the cast alone XLA may leave out
    summed = tuple(axis for axis, index in enumerate(indices) if index not in result)
    step = jnp.max(jnp.abs(a), axis=summed, keepdims=True) / _STEPS
    step = jnp.where(step == 0, 1.0, step)
    kept = "".join(index for index in result if index in indices)
    laid = jnp.einsum(f"{indices}->{kept}", step)
    laid = jnp.expand_dims(laid, tuple(axis for axis, index in enumerate(result) if index not in indices))
    return jnp.round(a / step).astype(jnp.int8), laid


def _indices(spec: str) -> tuple[str, str, str]:
    factors, result = spec.split("->")
    left, right = factors.split(",")
    return left, right, result


def _forward(spec, a, b, compute_dtype, quantization, span):
    rounded = a.astype(compute_dtype), b.astype(compute_dtype)
    types = jnp.zeros((), a.dtype), jnp.zeros((), b.dtype)  # residuals are arrays: the factors' types ride along as two
    return _value(spec, *rounded, compute_dtype, quantization), (*rounded, *types)


def _backward(spec, compute_dtype, quantization, span, residuals, g):
    del quantization
    a, b, like_a, like_b = residuals
    left, right, result = _indices(spec)
    start, stop = span or (0, a.shape[1])
    wanted = jax.lax.slice_in_dim(g, start, stop, axis=result.index(left[1])) if span else g
    da = _product(f"{result},{right}->{left}", wanted, b, compute_dtype)
    if span:
        da = jnp.pad(da, [(0, 0), (start, a.shape[1] - stop)] + [(0, 0)] * (a.ndim - 2))
    db = _product(f"{left},{result}->{right}", a, g, compute_dtype)
    return da.astype(like_a.dtype), db.astype(like_b.dtype)


dot.defvjp(_forward, _backward)
