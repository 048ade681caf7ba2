"""What is wrong with a run before it begins: its workdir, its config beside a checkpoint's, its rows on a mesh."""

import logging
import os
from pathlib import Path
from typing import Any

import jax

from diffusion_lm import sharding
from diffusion_lm.config import Config, from_json, to_json
from diffusion_lm.training.checkpoint import CheckpointMeta

log = logging.getLogger(__name__)

# What may change between a checkpoint and the run that goes on from it; anything else would be another experiment.
FREE = ("train.steps", "train.log_every", "train.eval_every", "train.eval_batches", "train.steps_per_call",
        "train.grad_accum_steps", "model.attention_kernel", "checkpoint.", "mesh.", "optim.", "data.path", "data.tokenizer",
        "data.token_cache_dir", "data.workers")  # fmt: skip


def check_workdir(workdir: Path | str) -> None:
    """Raises OSError with one line where nothing could be written; writes nothing itself."""
    workdir = Path(workdir).absolute()
    place = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"--workdir={workdir}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir={workdir}: no permission to write in {place}")


def check_config(config: Config, stored: CheckpointMeta, where: Path) -> None:
    """Raises ValueError naming each field that makes the config another experiment than the checkpoint's."""
    # Through the config, so that fields that came later have what they stood for.
    before, now = _flat(to_json(from_json(stored.config))), _flat(to_json(config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    wrong = [f"{key}={now.get(key)} (it has {before.get(key)})" for key in changed if not key.startswith(FREE)]
    if wrong:
        raise ValueError(f"the config doesn't match {where}: {', '.join(wrong)}; set them back or use a new workdir")
    if changed:
        log.info("changed since %s: %s", where, ", ".join(f"{key}={now.get(key)}" for key in changed))


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}".lstrip(".")).items()}


def check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError unless every device that holds rows of its own gets as many, and parts of rows are equal."""
    ways, parts, train = sharding.row_ways(mesh), sharding.length_ways(mesh), config.train
    if config.data.seq_len % parts:
        raise ValueError(
            f"data.seq_len={config.data.seq_len} can't be cut into {parts} equal parts; choose a multiple of it, or a "
            "mesh with less mesh.sequence"
        )
    if (train.batch_size // train.grad_accum_steps) % ways:
        raise ValueError(
            f"train.batch_size={train.batch_size} in train.grad_accum_steps={train.grad_accum_steps} parts can't be cut into rows for "
            f"{ways} devices; choose a batch that {ways * train.grad_accum_steps} divides, or a mesh with more mesh.tensor"
        )
