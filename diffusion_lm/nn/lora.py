"""What of a network is trained: all of it, or low-rank adapters beside its matrices (LoRA, arXiv 2106.09685)."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.nn.dot import dot, matrix

Array = jax.Array
TARGETS = ("query", "key_value", "output", "gate_up", "down")
MASK = "mask_embedding"
Axes = tuple[tuple[str | None, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """All parameters are trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters are trained beside the frozen parameters of `train.init`, and with them the mask's embedding.

    A product x W becomes x W + (alpha / rank) x A B, where B begins at zero.

    Args:
        rank: columns of A, and rows of B.
        alpha: how much adapters count, in units of the rank.
        targets: the matrices that have adapters: query, key_value, output (attention), gate_up, down (feed-forward).
            (): the mask's embedding alone is trained.
        where: "noisy" adapts canvases and drafts only, so that clean text has the base's numbers, bit for bit (gated
            LoRA, arXiv 2507.11851); "all" adapts every position, and can be merged into the base.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    where: Literal["noisy", "all"] = "noisy"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"trainable.rank must be at least 1; got {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"trainable.alpha must be positive; got {self.alpha}")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ValueError(f"trainable.targets: {unknown[0]} is none of {', '.join(TARGETS)}")
        if self.where not in ("noisy", "all"):
            raise ValueError(f"trainable.where={self.where} is unknown: set it to noisy or all")

    def span(self, noisy: tuple[int, int], row: int) -> tuple[int, int]:
        """The positions of a row that are adapted, of which those from noisy[0] to noisy[1] - 1 are noisy."""
        return (0, row) if self.where == "all" else noisy

    def embed(self, module: nn.Module, noisy: tuple[int, int], tokens: Array, mask: int, rows: Array) -> Array:
        """Embedded tokens [B, L, E], masks with their own trained vector."""
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        vector = module.param(MASK, init, (rows.shape[-1],), jnp.float32)
        index, (start, stop) = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], self.span(noisy, tokens.shape[1])
        here = (tokens == mask) & (index >= start) & (index < stop)
        return jnp.where(here[..., None], vector[None, None], rows)

    def add(
        self, module: nn.Module, name: str, noisy: tuple[int, int], x: Array, y: Array, compute_dtype: str,
        *, inputs: Axes, outputs: Axes, parts: Axes = (),
    ) -> Array:  # fmt: skip
        """y [B, L, ...] = the product of x [B, L, I] with the matrix `name`, and its adapter's product.

        Args:
            inputs, outputs, parts: logical names and sizes of the matrix's axes: those that are summed, those of the
                result, and of those the first ones that have an A of their own each (keys and values; gate and up).
        """
        if name not in self.targets:
            return y

        def made(kind: str, axes: Axes, fan_in: int) -> Array:
            return matrix(module, f"{name}_lora_{kind}", *zip(*((n, axis) for axis, n in axes), strict=True), fan_in)

        rank, width = ((None, self.rank),), x.shape[-1]
        a, b = made("a", (*inputs, *parts, *rank), width), made("b", (*parts, *rank, *outputs), 0)
        start, stop = self.span(noisy, x.shape[1])
        if start == stop:
            return y
        # Part by part: XLA's CPU has no batched products of bfloat16 factors in these layouts.
        low = dot("bli,ij->blj", x[:, start:stop], a.reshape(width, -1), compute_dtype)
        low = low.reshape(*low.shape[:2], -1, self.rank)
        b = b.reshape(low.shape[2], self.rank, -1)
        part = jnp.stack([dot("blr,ro->blo", low[:, :, i], b[i], compute_dtype) for i in range(len(b))], axis=2)
        part = y[:, start:stop] + (self.alpha / self.rank) * part.reshape(y[:, start:stop].shape)
        return part if part.shape == y.shape else jnp.concatenate([y[:, :start], part, y[:, stop:]], axis=1)


Trainable = Full | LoRA


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return name == MASK or name.endswith(("_lora_a", "_lora_b"))
