"""Trees of adapters (`nn.lora`): apart from the frozen parameters, together with them, and folded into them."""

import jax
import jax.numpy as jnp

from diffusion_lm.nn.lora import MASK, LoRA, is_adapter

Array = jax.Array


def adapters_of(params: dict) -> dict:
    """The adapters of a tree of parameters, boxed or not."""
    return _those(params, True)


def frozen_of(params: dict) -> dict:
    """The parameters that adapters are beside."""
    return _those(params, False)


def _those(params: dict, adapters: bool) -> dict:
    found = {}
    for name, value in params.items():
        if isinstance(value, dict):
            found |= {name: kept} if (kept := _those(value, adapters)) else {}
        elif is_adapter(name) == adapters:
            found[name] = value
    return found


def joined(base: dict, adapters: dict) -> dict:
    """Both trees in one: what a network with adapters takes."""
    both = {name: joined(base[name], adapters[name]) for name in base.keys() & adapters.keys()}
    return {**base, **adapters, **both}


def folded(params: dict, lora: LoRA, mask: int) -> dict:
    """The parameters of a network without adapters that computes what this one does with adapters of all positions.
    Each keeps its type."""
    adapters = adapters_of(params)

    def one(path: tuple, weight: Array) -> Array:
        names = [key.key for key in path]
        if names == ["embedding"]:
            return weight.at[mask].set(adapters[MASK].astype(weight.dtype))
        within = adapters
        for name in names[:-1]:
            within = within.get(name, {})
        a, b = (within.get(f"{names[-1]}_lora_{kind}") for kind in "ab")
        if a is None:
            return weight
        fold = jax.vmap(_product, (0, 0, 0, None)) if names[0].startswith("layers") else _product
        return (weight.astype(jnp.float32) + (lora.alpha / lora.rank) * fold(weight, a, b, lora.rank)).astype(
            weight.dtype
        )

    return jax.tree_util.tree_map_with_path(one, frozen_of(params))


def _product(weight: Array, a: Array, b: Array, rank: int) -> Array:
    """A B, as the weight lies: A [inputs, parts, rank], B [parts, rank, outputs]."""
    parts = a.size * b.size // (weight.size * rank * rank)
    a, b = a.reshape(-1, parts, rank), b.reshape(parts, rank, -1)
    return jnp.einsum("ipr,pro->ipo", a, b, precision=jax.lax.Precision.HIGHEST).reshape(weight.shape)
