"""Checkpoints: state, data position, config and tokenizer together, under WORKDIR/checkpoints/STEP.

Saving is asynchronous and a step's folder appears only when it is whole. Each saved tree carries a checksum of its
bits, which doesn't depend on the mesh: what comes back either is what was saved or is reported.
"""

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


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or none can be read; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """every: updates between saves (the last one is always saved); keep: how many, the newest."""

    save_every: int = 500
    max_to_keep: int = 3

    def __post_init__(self):
        if self.save_every < 1 or self.max_to_keep < 1:
            raise ValueError(
                f"checkpoint.save_every and checkpoint.max_to_keep must be positive; got {self.save_every}, {self.max_to_keep}"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint says of itself: the config and the tokenizer as JSON, the corpus's fingerprint."""

    config: dict
    tokenizer: dict
    corpus: str


class Restored(NamedTuple):
    """A state, and where the data stood."""

    step: int
    state: TrainState
    data: Any


class Checkpoints:
    """The checkpoints of one workdir. Reading writes nothing; the first save makes the folder."""

    def __init__(self, workdir: Path | str, options: Checkpointing | None = None):
        self.folder = Path(workdir).absolute() / FOLDER
        self.options = options or Checkpointing()
        self._writer = None

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
        """The newest step whose description can be read (or that step's), and the description; None without any."""
        return self._newest(_meta, step, lambda step, meta: (step, meta))

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest state that is whole, or None where nothing was saved yet.

        abstract: shapes, dtypes and shardings; the mesh may differ from the one that saved. Broken checkpoints are
        reported, moved to WORKDIR/checkpoints.broken and passed over. Raises CheckpointError if all are broken.
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
        """Parameters alone, with their step: the averaged ones where the run kept them and `ema` asks for them."""

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

    def save(self, step: int, state: TrainState, data: Any, meta: CheckpointMeta) -> None:
        """Begins to write a checkpoint, once the one before it is through. data: JSON, where the loader stands."""
        trees = _trees(state)
        sums = {name: int(total) for name, total in _checksums(trees).items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["data"] = ocp.args.JsonSave(data)
        items["meta"] = ocp.args.JsonSave(
            {
                "config": meta.config,
                "tokenizer": meta.tokenizer,
                "corpus": meta.corpus,
                "checksums": sums,
            }
        )
        with self._writing(step):
            if self._writer is None:
                self._writer = self._open_writer()
            self._writer.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Until the last save is through. Raises CheckpointError where it failed."""
        if self._writer is not None:
            with self._writing(None):
                self._writer.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads; saving again opens them anew."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._writing(None):
                writer.close()

    def _reader(self) -> ocp.CheckpointManager:
        """Reads as if this process were alone: one that finds damage must not keep the others waiting."""
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
        keep = ocp.checkpoint_managers.LatestN(self.options.max_to_keep)
        return _Writer(
            self.folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True),
        )

    def _newest(self, read, step: int | None, finish, move: bool = False) -> Any:
        """finish(step, read(reader, step)) of the newest step for which it works, or of that step alone; None without
        any. read: by each process for itself; finish: by all together, once all of them have read."""
        broken, steps = [], self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} holds no step {step}, only {steps}")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                return finish(candidate, self._read_everywhere(read, candidate))
            except Exception as error:  # Orbax and tensorstore raise whatever they like on damaged files
                broken.append(candidate)
                log.warning("checkpoint %s can't be used: %s", self.path(candidate), _line(error))
                log.debug("the whole error", exc_info=True)
                if move:
                    self._set_aside(candidate)
        if broken:
            raise CheckpointError(f"no usable checkpoint in {self.folder} (tried {broken}); move it away to start anew")
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
        """Makes room for the same step, saved anew, without destroying what may be of use to somebody."""
        if hosts.is_first():
            grave = self.folder.with_name(FOLDER + ".broken")
            grave.mkdir(exist_ok=True)
            free = next(n for n in range(1_000_000) if not (grave / f"{step}.{n}").exists())
            self.path(step).rename(grave / f"{step}.{free}")
            log.warning("moved it to %s", grave / f"{step}.{free}")

    def _writing(self, step: int | None):
        return _OneLine(f"can't save checkpoint {self.folder if step is None else self.path(step)}")


class _Writer(ocp.CheckpointManager):
    """Leaves it to the loop to ask whether the run is to stop: JAX wants to be asked in order, from one place."""

    def reached_preemption(self, step: int) -> bool:
        return False


class _OneLine:
    """Turns what Orbax raises into one line; earlier checkpoints are untouched, for a step appears only when whole."""

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
    """The items of a checkpoint: apart, so that sampling reads no optimizer."""
    trees = {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}}
    return trees if state.ema_params is None else {**trees, "ema": state.ema_params}


def _json(reader: ocp.CheckpointManager, step: int, item: str) -> Any:
    return reader.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]


def _meta(reader: ocp.CheckpointManager, step: int) -> CheckpointMeta:
    meta = _json(reader, step, "meta")
    return CheckpointMeta(config=meta["config"], tokenizer=meta["tokenizer"], corpus=meta["corpus"])


def _read_trees(reader: ocp.CheckpointManager, step: int, abstract: dict[str, Any]) -> tuple[dict, dict[str, int]]:
    """The items asked for, and the checksums that they had."""
    args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    restored = reader.restore(step, args=ocp.args.Composite(**args))
    return {name: restored[name] for name in abstract}, _json(reader, step, "meta")["checksums"]


def _verified(found: tuple[dict[str, Any], dict[str, int]]) -> dict[str, Any]:
    """The items. Raises ValueError where their bits aren't those that were saved."""
    trees, saved = found
    for name, total in _checksums(trees).items():
        if int(total) != saved[name]:
            raise ValueError(f"the checksum of its {name} is wrong")
    return trees


@jax.jit
def _checksums(trees: dict[str, Any]) -> dict[str, Array]:
    """uint32 [] an item: the sum of all bits as integers, so in any order and on any mesh the same."""
    return {
        name: reduce(operator.add, map(_bits, jax.tree.leaves(tree)), jnp.uint32(0)) for name, tree in trees.items()
    }


def _bits(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)
