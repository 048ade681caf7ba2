"""The public families that we read and write, and which of them a config.json is of."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from diffusion_lm.models import (
    a2d_qwen3,
    bd3lm,
    diffusion_gemma,
    dream,
    fastdllm_v2,
    gemma3,
    gpt2,
    llada,
    llada2,
    lladamoe,
    llama,
    md4,
    mdlm,
    ministral3,
    qwen2,
    qwen3,
    qwen3_moe,
    sdar,
    sedd,
    tiny_diffusion,
)

FAMILIES = (
    a2d_qwen3, bd3lm, diffusion_gemma, dream, fastdllm_v2, gemma3, gpt2, llada, llada2, lladamoe, llama, md4, mdlm,
    ministral3, qwen2, qwen3, qwen3_moe, sdar, sedd, tiny_diffusion,
)  # fmt: skip


def family_of(config: Mapping[str, Any], source: str = "config.json") -> ModuleType:
    """The family of a config.json, a `models.family.Family`.

    Args:
        config: the file's content.
        source: what messages call it.

    Raises:
        ValueError: for a model_type that no family reads, and for a file without one that isn't known by its keys.
    """
    known = {name: family for family in FAMILIES for name in family.MODEL_TYPES}
    found = config.get("model_type")
    if found is None:
        for family in FAMILIES:
            if (keys := getattr(family, "KEYS", ())) and config.keys() >= set(keys):
                return family
    if not isinstance(found, str) or found not in known:
        named = "names no model_type" if found is None else f"sets model_type={found!r}, which isn't implemented"
        raise ValueError(f"{source} {named}: known are {', '.join(sorted(known))}")
    return known[found]


def named(family: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's tensors under the names of `family.leaves`: some files of a family omit or add a prefix, which its
    `own_name` (name -> name, where it has one) undoes."""
    own_name = getattr(family, "own_name", None)
    return {own_name(name) if own_name else name: tensor for name, tensor in tensors.items()}
