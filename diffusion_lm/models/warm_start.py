"""Parameters that begin with another network's: what is taken over, what is fresh, what is left."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.models.base import ModelSpec, Vocabulary

Array = jax.Array
# Parameters that one of two networks that fit may lack: inputs that a network can be given later, learned noise.
_OPTIONAL = ("time_in", "time_out", "adaln", "self_conditioning", "noise")
# What may differ and is no parameter.
_FREE = ("self_conditioning", "logit_shift", "router_aux_loss_weight", "vocabulary")
_ADDED = ("time", "conditioner")  # what one of the two may lack

Path = tuple[str, ...]


class WarmStart(NamedTuple):
    """How a network's parameters come from another's.

    Args:
        vocabulary: of the network.
        taken, fresh, left: numbers in the parameters that both have, that only this network has, and that only the
            other has, by path.
        fresh_mask: whether the mask's embedding is fresh, as the other network was never given a mask: it begins as the
            mean of all tokens'.
    """

    vocabulary: Vocabulary
    taken: dict[Path, int]
    fresh: dict[Path, int]
    left: dict[Path, int]
    fresh_mask: bool

    def fill(self, drawn: Any, params: Any) -> Any:
        """The network's parameters: `params` of the other where both have them, else `drawn`, both without boxes."""
        other = _by_path(params)

        def one(path: Path, own: Array) -> Array:
            if path not in self.taken:
                return own
            found = other[path].astype(own.dtype)
            return found.at[self.vocabulary.mask].set(self.mask_vector(found)) if path == ("embedding",) else found

        return jax.tree_util.tree_map_with_path(lambda path, own: one(_path(path), own), drawn)

    def mask_vector(self, table: Array) -> Array:
        """The mask's embedding to begin with, float32 [E]: the other network's, or the mean of all tokens'."""
        table, v = table.astype(jnp.float32), self.vocabulary
        return jnp.mean(table[: v.size], axis=0) if self.fresh_mask else table[v.mask]

    def shared(self, params: Any) -> dict:
        """Those of the other network's parameters that this one has as well."""

        def kept(tree: dict, path: Path) -> dict:
            tried = {n: kept(v, (*path, n)) if isinstance(v, dict) else v for n, v in tree.items()}
            return {n: v for n, v in tried.items() if (v if isinstance(v, dict) else (*path, n) in self.taken)}

        return kept(params, ())

    def table(self) -> str:
        """What is taken over, fresh and left, a line each: how many numbers, and where."""
        row = self._mask_row
        lines = [
            ("taken over", sum(self.taken.values()) - row, _tops(self.taken)),
            ("fresh", sum(self.fresh.values()) + row, [*(["the mask's embedding"] if row else []), *_tops(self.fresh)]),
            ("left", sum(self.left.values()), _tops(self.left)),
        ]
        return "\n".join(f"  {kind:<10}  {count:>15,}  {', '.join(names)}".rstrip() for kind, count, names in lines)

    @property
    def _mask_row(self) -> int:
        return self.taken[("embedding",)] // self.vocabulary.rows if self.fresh_mask else 0


def warm_start(
    spec: ModelSpec, vocabulary: Vocabulary, abstract: Any, other_spec: ModelSpec, other: Any, *, fresh_mask: bool
) -> WarmStart:
    """Compares a network with the one that it is to begin with, before anything is computed.

    Args:
        spec, vocabulary, abstract: of the network; its parameters' shapes, layers stacked, without boxes.
        other_spec, other: of the other one.
        fresh_mask: see `WarmStart`.

    Raises:
        ValueError: with what doesn't fit, to be put after the other network's name.
    """
    if wrong := [name for name in ModelSpec.__annotations__ if _differs(spec, other_spec, name)]:
        raise ValueError(f"is a network of another {', '.join(wrong)}: set model=FromInit() for the same")
    own, theirs = _by_path(abstract), _by_path(other)
    sizes = {path: math.prod(leaf.shape) for path, leaf in (theirs | own).items()}
    for path in sorted(own.keys() & theirs.keys()):
        if own[path].shape != theirs[path].shape:
            raise ValueError(
                f"holds {'/'.join(path)} of shape {theirs[path].shape}; this network's is {own[path].shape}"
            )
    for path in sorted(own.keys() ^ theirs.keys()):
        if not any(part in _OPTIONAL for part in path):
            raise ValueError(f"{'holds' if path in theirs else 'lacks'} {'/'.join(path)}: its network is another one")
    return WarmStart(
        vocabulary=vocabulary,
        taken={path: sizes[path] for path in own if path in theirs},
        fresh={path: sizes[path] for path in own if path not in theirs},
        left={path: sizes[path] for path in theirs if path not in own},
        fresh_mask=fresh_mask,
    )


def _differs(spec: ModelSpec, other: ModelSpec, name: str) -> bool:
    """Whether a field of the two says that they don't fit."""
    one, another = getattr(spec, name), getattr(other, name)
    if name == "groups":
        one, another = (
            [(dataclasses.replace(group.layer, modulation=None), group.repeat) for group in groups]
            for groups in (one, another)
        )
    lacking = name in _ADDED and None in (one, another)
    return name not in _FREE and not lacking and one != another


def _path(keys: tuple) -> Path:
    return tuple(key.key for key in keys)


def _by_path(tree: Any) -> dict[Path, Any]:
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _tops(paths: dict[Path, int]) -> list[str]:
    """The paths' optional parts by their own names, all else by the first."""
    return sorted({next((part for part in path if part in _OPTIONAL), path[0]) for path in paths})
