"""Checkpoints: state, data position, config and tokenizer together, under WORKDIR/checkpoints/STEP.

Saving is asynchronous, and a step's folder appears only when it is whole. Each saved tree has a checksum of its bits,
which doesn't depend on the mesh, so that a damaged one is noticed.
"""

import hashlib
import json
import logging
import operator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from diffusion_lm.training import hosts
from diffusion_lm.training.state import TrainState
from diffusion_lm.types import Array

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
FORMAT = 2  # of what is stored; another one can't be read


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or none can be read; the message is one line for the user."""


class FormatError(CheckpointError):
    """A checkpoint was written in another format: it is whole, and another version of this package reads it."""


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """How often to save.

    Args:
        save_every: updates between checkpoints; the last update is always saved.
        max_to_keep: how many checkpoints are kept, the newest; and that of the lowest held-out loss beside them where
            train.early_stopping_patience asks for it.
    """

    save_every: int = 500
    max_to_keep: int = 3

    def __post_init__(self):
        for name in ("save_every", "max_to_keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} must be positive; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint stores beside arrays.

    Args:
        config: as JSON.
        tokenizer: as JSON.
        corpus: the fingerprint of the data.
        format: of the checkpoint.
        source: of a converted model: its config.json and the files beside it; the checkpoint holds parameters alone,
            its layers apart and its matrices in the type of `config.exec`. None for a training run.
        base: the fingerprint of the checkpoint that adapters belong to; None where all parameters are held.
    """

    config: dict
    tokenizer: dict
    corpus: str
    format: int = FORMAT
    source: dict | None = None
    base: str | None = None


class Restored(NamedTuple):
    """A state, and the position of its data."""

    step: int
    state: TrainState
    data: Any


class Checkpoints:
    """The checkpoints of one workdir. Reading writes nothing; the first save makes the folder."""

    def __init__(self, workdir: Path | str, options: Checkpointing | None = None):
        self.folder = Path(workdir).absolute() / FOLDER
        self.options = options or Checkpointing()
        self._writer, self._kept = None, _NewestAndBest(self.options.max_to_keep)

    def steps(self) -> list[int]:
        """Steps that were saved whole, oldest first."""
        found = []
        if self.folder.is_dir():
            with self._reader() as reader:
                found = sorted(reader.all_steps())
        hosts.check_same(f"checkpoints in {self.folder}", found)
        return found

    def path(self, step: int) -> Path:
        """Where a step's checkpoint is."""
        return self.folder / str(step)

    def meta(self, step: int | None = None) -> tuple[int, CheckpointMeta] | None:
        """The newest step whose metadata can be read (or `step`), and the metadata; None if there is no checkpoint."""
        return self._newest(_meta, step, lambda step, meta: (step, meta))

    def fingerprint(self, step: int) -> str:
        """Changes with the step's network, tokenizer or parameters: those that sampling takes."""
        with self._reader() as reader:
            meta = _json(reader, step, "meta")
        sums = meta["checksums"]
        content = [meta["config"]["model"], meta["tokenizer"], sums.get("ema", sums["params"])]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest state that is whole; None if there is no checkpoint.

        Broken checkpoints are reported, moved to WORKDIR/checkpoints.broken, and skipped.

        Args:
            abstract: shapes, dtypes and shardings; the mesh may differ from the one that saved.

        Raises:
            CheckpointError: if all are broken.
        """

        def read(reader, step):
            return _read_trees(reader, step, _trees(abstract)), _json(reader, step, "data")

        def finish(step, found):
            trees, data = _verified(found[0]), found[1]
            state = TrainState(
                step=trees["optimizer"]["step"],
                params=trees["params"],
                ema_params=trees.get("ema"),
                opt_state=trees["optimizer"]["state"],
            )
            return Restored(step, state, data)

        return self._newest(read, None, finish, move=True)

    def restore_params(self, abstract: Any, *, step: int | None = None, ema: bool = True) -> tuple[int, Any]:
        """The step and its parameters; with `ema` their moving average, if the run kept one."""

        def read(reader, step):
            item = "ema" if ema and "ema" in _json(reader, step, "meta")["checksums"] else "params"
            return _read_trees(reader, step, {item: abstract})

        def finish(step, found):
            (params,) = _verified(found).values()
            return step, params

        found = self._newest(read, step, finish)
        if found is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint; train one with launch.train")
        return found

    def keep(self, step: int) -> None:
        """Keeps this step from now on, and no longer the one that was named before."""
        self._kept.best = step

    def save(self, step: int, state: TrainState, data: Any, meta: CheckpointMeta) -> None:
        """Starts writing a checkpoint, after the previous one is written. data: the loader's position, as JSON."""
        self._save(step, _trees(state), data, meta)

    def save_parameters(self, params: Any, meta: CheckpointMeta) -> None:
        """Starts writing a checkpoint of parameters alone, as step 0. Raises CheckpointError where there is one."""
        if found := self.steps():
            raise CheckpointError(f"{self.folder} holds step {found[-1]} already: name a new workdir")
        self._save(0, {"params": params}, None, meta)

    def _save(self, step: int, trees: dict[str, Any], data: Any, meta: CheckpointMeta) -> None:
        sums = {name: int(total) for name, total in _checksums(trees).items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["data"] = ocp.args.JsonSave(data)
        items["meta"] = ocp.args.JsonSave(
            {
                "config": meta.config,
                "tokenizer": meta.tokenizer,
                "corpus": meta.corpus,
                "format": meta.format,
                "source": meta.source,
                "base": meta.base,
                "checksums": sums,
            }
        )
        with self._writing(step):
            if self._writer is None:
                self._writer = self._open_writer()
            self._writer.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Raises CheckpointError if that failed."""
        if self._writer is not None:
            with self._writing(None):
                self._writer.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops Orbax's threads; saving again starts them."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._writing(None):
                writer.close()

    def _reader(self) -> ocp.CheckpointManager:
        """A reader for this process alone: one that finds damage must not keep the others waiting."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
        )
        options = ocp.CheckpointManagerOptions(
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _open_writer(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, cleanup_tmp_directories=True)
        return _Writer(self.folder, options=options)

    def _newest(self, read, step: int | None, finish, move: bool = False) -> Any:
        """finish(step, read(reader, step)) for the newest step for which it works, or for `step` alone; None if there
        is none. Each process reads for itself; all finish together, once all of them have read."""
        broken, steps = [], self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} holds no step {step}, only {steps}")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                return finish(candidate, self._read_everywhere(read, candidate))
            except FormatError:
                raise
            except Exception as error:  # Orbax and tensorstore raise many kinds on damaged files
                broken.append(candidate)
                log.warning("checkpoint %s can't be used: %s", self.path(candidate), _line(error))
                log.debug("the whole error", exc_info=True)
                if move:
                    self._set_aside(candidate)
        if broken:
            raise CheckpointError(f"no usable checkpoint in {self.folder} (tried {broken}): move it away to start anew")
        return None

    def _read_everywhere(self, read, step: int) -> Any:
        """read(reader, step); raises on all processes where it raises on one."""
        found, error = None, None
        try:
            with self._reader() as reader:
                found = read(reader, step)
        except Exception as raised:
            error = raised
        if hosts.anywhere(error is not None):
            raise error or CheckpointError("another host can't read it")
        return found

    def _set_aside(self, step: int) -> None:
        """Moves a broken step away, so that it can be saved again; nothing is deleted."""
        if hosts.is_first():
            broken = self.folder.with_name(FOLDER + ".broken")
            broken.mkdir(exist_ok=True)
            free = next(n for n in range(1_000_000) if not (broken / f"{step}.{n}").exists())
            self.path(step).rename(broken / f"{step}.{free}")
            log.warning("moved it to %s", broken / f"{step}.{free}")

    def _writing(self, step: int | None):
        return OneLine(f"can't save checkpoint {self.folder if step is None else self.path(step)}")


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `count` checkpoints, and `best`."""

    def __init__(self, count: int):
        self.count, self.best = count, None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        first = len(checkpoints) - self.count
        return [i >= first or checkpoint.step == self.best for i, checkpoint in enumerate(checkpoints)]


class _Writer(ocp.CheckpointManager):
    """Doesn't poll for preemption: JAX requires that one place asks, in order, and the loop does."""

    def reached_preemption(self, step: int) -> bool:
        return False


class OneLine:
    """Turns what Orbax raises into one line. Earlier checkpoints are intact: a step appears only when it is whole."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            raise CheckpointError(f"{self.what}: {_line(error)}; earlier checkpoints are intact") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _trees(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint; separate, so that sampling doesn't read the optimizer's state."""
    trees = {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}}
    return trees if state.ema_params is None else {**trees, "ema": state.ema_params}


def _json(reader: ocp.CheckpointManager, step: int, item: str) -> Any:
    return reader.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]


def _meta(reader: ocp.CheckpointManager, step: int) -> CheckpointMeta:
    meta = _json(reader, step, "meta")
    if meta.get("format") != FORMAT:
        raise FormatError(
            f"checkpoint {reader.directory / str(step)} has format {meta.get('format')}, this version reads {FORMAT}: "
            "use the version that wrote it, or train again in another workdir"
        )
    fields = {name: meta[name] for name in ("config", "tokenizer", "corpus")}
    return CheckpointMeta(**fields, source=meta.get("source"), base=meta.get("base"))


def _read_trees(reader: ocp.CheckpointManager, step: int, abstract: dict[str, Any]) -> tuple[dict, dict[str, int]]:
    """The items, and the checksums that they were saved with."""
    args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    restored = reader.restore(step, args=ocp.args.Composite(**args))
    return {name: restored[name] for name in abstract}, _json(reader, step, "meta")["checksums"]


def _verified(found: tuple[dict[str, Any], dict[str, int]]) -> dict[str, Any]:
    """The items. Raises ValueError if their bits differ from those that were saved."""
    trees, saved = found
    for name, total in _checksums(trees).items():
        if int(total) != saved[name]:
            raise ValueError(f"the checksum of its {name} is wrong")
    return trees


@jax.jit
def _checksums(trees: dict[str, Any]) -> dict[str, Array]:
    """uint32 [] per item: the sum of all bits as integers, the same in any order and on any mesh."""
    return {
        name: reduce(operator.add, map(_bits, jax.tree.leaves(tree)), jnp.uint32(0)) for name, tree in trees.items()
    }


def _bits(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)
