"""Checks before a run starts: workdir, config against checkpoint, batch and attention kernel against mesh."""

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm import sharding
from diffusion_lm.config import Config, allowed_by, from_json, to_json
from diffusion_lm.nn import cudnn
from diffusion_lm.nn.lora import LoRA
from diffusion_lm.training.checkpoint import CheckpointMeta

log = logging.getLogger(__name__)

# Keys that may change between a checkpoint and the run that resumes it; any other would make it another experiment.
MAY_CHANGE = (
    "checkpoint.", "data.path", "data.token_cache_dir", "data.tokenizer", "data.workers", "exec.", "mesh.",
    "optim.", "train.early_stopping_patience", "train.eval_batches", "train.eval_every", "train.grad_accum_steps",
    "train.log_every", "train.steps", "train.steps_per_call",
)  # fmt: skip


def check_workdir(workdir: Path | str) -> None:
    """Raises OSError if the folder, or the one it would be made in, can't be written to. Writes nothing."""
    workdir = Path(workdir).absolute()
    place = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"--workdir={workdir}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir={workdir}: no permission to write in {place}")


def check_config(config: Config, stored: CheckpointMeta, where: Path) -> None:
    """Raises ValueError naming each key that differs from the checkpoint's at `where`, unless it may change."""
    # Decoding the stored config gives newer fields their defaults.
    old = from_json(stored.config, allowed_by(config))
    before, now = _flat(to_json(old)), _flat(to_json(config))
    changed = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    changed = {key: values for key, values in changed.items() if values[0] != values[1]}
    # Adapters know their base by its fingerprint: it may have moved.
    may_change = (*MAY_CHANGE, "train.init") if isinstance(config.trainable, LoRA) else MAY_CHANGE
    wrong = [f"{key}={new} (it has {old})" for key, (old, new) in changed.items() if not key.startswith(may_change)]
    if wrong:
        raise ValueError(f"the config doesn't match {where}: {', '.join(wrong)}; set them back or use a new workdir")
    if changed:
        log.info("changed since %s: %s", where, ", ".join(f"{key}={new}" for key, (_, new) in changed.items()))
    _report_rate(old, config, int(where.name))


def _report_rate(old: Config, new: Config, step: int) -> None:
    """Warns if a resumed run's learning rate jumps because its schedule, or the number of steps, has changed."""
    before, after = (float(config.optim.rate(config.train.steps)(jnp.int32(step))) for config in (old, new))
    if step >= new.train.steps or math.isclose(before, after, rel_tol=0.01):
        return
    lr = getattr(new.optim, "lr", None)
    keep = f": set optim.lr={lr * before / after:.4g} to continue from the old rate" if lr and before and after else ""
    log.warning("the learning rate at step %d changes from %.4g to %.4g%s", step, before, after, keep)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested JSON as dotted keys and plain values."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}".lstrip(".")).items()}


def check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError unless the mesh divides a batch's rows, and a row's positions, evenly."""
    devices, parts, train = sharding.row_ways(mesh), sharding.length_ways(mesh), config.train
    if config.data.seq_len % parts:
        raise ValueError(
            f"data.seq_len={config.data.seq_len} can't be cut into mesh.sequence={parts} equal parts: set it to a "
            "multiple, or mesh.sequence lower"
        )
    if (train.batch_size // train.grad_accum_steps) % devices:
        raise ValueError(
            f"train.batch_size={train.batch_size} in train.grad_accum_steps={train.grad_accum_steps} parts can't be "
            f"divided among {devices} devices: set train.batch_size to a multiple of "
            f"{devices * train.grad_accum_steps}, or mesh.tensor higher"
        )


def check_kernel(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the mesh's devices can't run exec.attention_kernel."""
    with sharding.using(mesh):
        if config.exec.attention_kernel == "cudnn":
            cudnn.check_devices()
        if config.exec.attention_kernel == "splash" and sharding.platform() != "tpu":
            raise ValueError(
                f"exec.attention_kernel=splash is for TPUs and this runs on {sharding.platform()}: set "
                "exec.attention_kernel=auto"
            )


def runnable(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """The config of a run that may have been trained on other devices, with a kernel that the mesh's devices have."""
    try:
        check_kernel(config, mesh)
    except ValueError as error:
        log.info("exec.attention_kernel is auto here: %s", error)
        return dataclasses.replace(config, exec=dataclasses.replace(config.exec, attention_kernel="auto"))
    return config
