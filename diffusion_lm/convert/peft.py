"""Adapters in the files of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors, both ways.

PEFT keeps A as [rank, inputs] and B as [outputs, rank], beside a layer `NAME.weight` of the base as
`base_model.model.NAME.lora_A.weight` and `.lora_B.weight`. Ours lie as their matrices do (`nn.lora`): keys beside
values and gates beside ups, each with an A of its own; a family's leaves say which tensor is which part.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_lm.convert.huggingface import parse_json, read_header, write_file
from diffusion_lm.models.family import Family, layers_of
from diffusion_lm.models.weights import Part
from diffusion_lm.nn.lora import MASK, TARGETS, LoRA
from diffusion_lm.nn.specs import MLPSpec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT that change what adapters compute, with the only value that ours have.
_PLAIN = {
    "peft_type": "LORA", "use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
    "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None,
    "lora_bias": False, "target_parameters": None,
}  # fmt: skip


class _Site(NamedTuple):
    """A tensor of the base that may have an adapter: where ours is, and which part of it."""

    path: tuple[str, ...]  # of the matrix that the adapter is beside
    part: Part


def export_adapters(folder: Path | str, adapters: dict, lora: LoRA, family: Family, spec: Any, base: str) -> None:
    """Writes adapters, their layers apart (`layer_0`, ...), into a new folder as PEFT has them.

    The mask's embedding, which PEFT has no place for, is a tensor of its own, `mask_embedding`. base: what the file
    calls the base model. Raises ValueError for a family whose projections share tensors, FileExistsError for a folder
    that holds something.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already: name a new folder")
    tensors, modules = {MASK: np.asarray(adapters[MASK], np.float32)}, set()
    for site in _sites(family, spec, lora.targets):
        a, b = (np.asarray(_get(adapters, site, kind), np.float32) for kind in "ab")
        index, module = _index(site.part), site.part.tensor.removesuffix(".weight")
        a = a[(*[slice(None)] * site.part.inputs, *index)].reshape(-1, lora.rank)
        b = b[index].reshape(lora.rank, -1)
        if not (a.any() or b.any()):  # a projection that shares its matrix with an adapted one
            continue
        tensors |= {f"{_PREFIX}{module}.lora_{k}.weight": np.ascontiguousarray(x.T) for k, x in (("A", a), ("B", b))}
        modules.add(module.rpartition(".")[2])
    config = {**_PLAIN, "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(modules),
              "lora_dropout": 0.0, "init_lora_weights": True, "inference_mode": True, "task_type": "CAUSAL_LM",
              "base_model_name_or_path": base}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / TENSORS, tensors)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapters(folder: Path | str, abstract: dict, family: Family, spec: Any) -> tuple[LoRA, dict]:
    """PEFT's folder as adapters of a network of `family`, their layers apart, acting at all positions.

    Args:
        abstract: (LoRA) -> the shapes of such adapters, without boxes.

    Raises FileNotFoundError or ValueError with one line for what isn't there, isn't plain LoRA or doesn't fit.
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it holds no adapters of PEFT")
    config = parse_json((folder / CONFIG).read_bytes(), str(folder / CONFIG))
    for key, only in _PLAIN.items():
        if (found := config.get(key, only)) != only and (found or only):
            raise ValueError(f"{folder}/{CONFIG} sets {key}={found!r}; only {only!r} is implemented")
    header = read_header(folder / TENSORS)
    sites = {f"{_PREFIX}{site.part.tensor.removesuffix('.weight')}": site for site in _sites(family, spec, TARGETS)}
    modules = {name.rpartition(".lora_")[0] for name in header if name != MASK}
    if odd := sorted(modules - sites.keys()):
        raise ValueError(f"{folder} adapts {odd[0].removeprefix(_PREFIX)}, which has no adapters here")
    rank = int(config["r"])
    alpha = float(config["lora_alpha"]) * (rank**0.5 if config.get("use_rslora") else 1.0)
    targets = tuple(t for t in TARGETS if any(sites[module].path[-1] == t for module in modules))
    lora = LoRA(rank=rank, alpha=alpha, targets=targets, where="all")
    adapters = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), abstract(lora))
    if MASK in header:
        adapters[MASK][:] = header[MASK].read()
    for module in sorted(modules):
        site = sites[module]
        a, b = (_read(folder, header, f"{module}.lora_{kind}.weight") for kind in "AB")
        index, part = _index(site.part), site.part
        places = _get(adapters, site, "a")[(*[slice(None)] * part.inputs, *index)], _get(adapters, site, "b")[index]
        if a.size != places[0].size or b.size != places[1].size:
            raise ValueError(f"{folder} holds {module} of shapes {a.shape} and {b.shape}, which don't fit the base")
        for place, value in zip(places, (a, b), strict=True):
            place[...] = value.T.reshape(place.shape)
    return lora, adapters


def _read(folder: Path, header: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in header:
        raise ValueError(f"{folder}/{TENSORS} has no {name}")
    return np.asarray(header[name].read(), np.float32)


def _sites(family: Family, spec: Any, targets: tuple[str, ...]) -> Iterator[_Site]:
    plain = [isinstance(layer.mlp, MLPSpec) for layer in layers_of(spec)]
    for leaf in family.leaves(spec):
        if leaf.path[-1] not in targets or (leaf.path[-2] == "mlp" and not plain[int(leaf.path[0][6:])]):
            continue
        for part in leaf.parts:
            if part.select or part.inputs_first:
                raise ValueError(f"{part.tensor} is several projections in one, which PEFT adapts as one: fold instead")
            yield _Site(leaf.path, part)


def _index(part: Part) -> tuple[int, ...]:
    """Which of the parts of its matrix the tensor is; () where it is all of it."""
    return tuple(i for i in part.place if isinstance(i, int))


def _get(adapters: dict, site: _Site, kind: str) -> np.ndarray:
    for name in site.path[:-1]:
        adapters = adapters[name]
    return adapters[f"{site.path[-1]}_lora_{kind}"]
