"""The training loop: one fixed order of operations."""

import contextlib
import json
import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_lm import lock
from diffusion_lm.sharding import platform
from diffusion_lm.training import hosts
from diffusion_lm.training.checkpoint import CheckpointError, CheckpointMeta, Checkpoints
from diffusion_lm.training.clock import Clock
from diffusion_lm.training.metrics import Metrics, ProgressBar
from diffusion_lm.training.state import TrainState
from diffusion_lm.training.step import Step
from diffusion_lm.types import Array, Batch

log = logging.getLogger(__name__)

IN_FLIGHT = 2  # calls queued on an accelerator: enough to keep it busy, few enough to stop quickly


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not finite; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long to train, and how much at a time.

    Args:
        init: workdir of a run, or of a converted model, whose network, tokenizer and parameters the run begins with;
            none: parameters are drawn.
        steps: updates in all.
        batch_size: rows per update, over all hosts.
        grad_accum_steps: parts in which a batch is processed, to save memory; divides batch_size.
        steps_per_call: updates per call of the device; divides steps, eval_every and checkpoint.save_every.
        ema_decay: decay of the moving average of the parameters; 0 for none.
        log_every: updates between rows of metrics.jsonl.
        eval_every: updates between evaluations, which also happen at the end; 0 for only then.
        eval_batches: batches of held-out data in one evaluation.
        early_stopping_patience: evaluations in a row without a lower held-out loss after which the run stops; the
            checkpoint of the lowest is kept. 0: the run goes to the end.
    """

    init: str | None = None
    steps: int = 1000
    batch_size: int = 16
    grad_accum_steps: int = 1
    steps_per_call: int = 1
    ema_decay: float = 0.0
    log_every: int = 10
    eval_every: int = 500
    eval_batches: int = 8
    early_stopping_patience: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "grad_accum_steps", "steps_per_call", "log_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be positive; got {getattr(self, name)}")
        if self.eval_every < 0:
            raise ValueError(f"train.eval_every can't be negative (0: never); got {self.eval_every}")
        if self.early_stopping_patience < 0 or (self.early_stopping_patience and not self.eval_every):
            raise ValueError(
                f"train.early_stopping_patience={self.early_stopping_patience} counts evaluations: it must be at least "
                "0, and needs train.eval_every"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must lie in [0, 1); got {self.ema_decay}")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"train.grad_accum_steps={self.grad_accum_steps} doesn't divide train.batch_size={self.batch_size}"
            )
        for name in ("steps", "eval_every"):
            if getattr(self, name) % self.steps_per_call:
                raise ValueError(f"train.steps_per_call={self.steps_per_call} doesn't divide train.{name}")


@dataclass(frozen=True, kw_only=True)
class TrainLoop:
    """All that the loop calls, each part already on its mesh.

    Args:
        initial: () -> the state before the first step.
        abstract: its shapes and shardings.
        step: (state, key, batches [S, B, L] on the devices, constants) -> state, metrics [S]; donates the state.
        constants: the last argument of step: frozen networks and arrays, on the devices.
        batches: an iterator of NumPy Batches with get_state() -> JSON and set_state.
        put: NumPy Batch [S, B, L] -> arrays on the devices.
        evaluate: parameters -> metrics of held-out data, nats per target.
        key: the run's key; step number i uses fold_in(key, i).
        meta: what each checkpoint stores beside the state.
        flops: () -> useful operations of an update on all devices together; 0 if they aren't counted.
    """

    initial: Callable[[], TrainState]
    abstract: TrainState
    step: Step
    batches: Iterator[Batch]
    put: Callable[[Batch], Batch]
    evaluate: Callable[[Any], dict[str, float]]
    key: Array
    meta: CheckpointMeta
    constants: Any = field(default_factory=dict)
    flops: Callable[[], int] = lambda: 0


class Result(NamedTuple):
    """What a run did.

    tokens_per_s is None if it made fewer than two calls of the device (a finished run started again makes none), mfu
    where the device's peak is unknown. seconds counts everything, `spent` splits it by kind (see `clock`). best_step is
    that of the lowest held-out loss, whose checkpoint is kept; None without train.early_stopping_patience.
    """

    steps: int
    interrupted: bool
    values: dict[str, float]
    tokens_per_s: float | None
    seconds: float
    checkpoint: Path
    spent: dict[str, float]
    goodput: float
    mfu: float | None
    best_step: int | None = None


def run(job: TrainLoop, train: Train, workdir: Path | str, checkpoints: Checkpoints) -> Result:
    """Trains up to train.steps, from the workdir's newest whole checkpoint if there is one.

    SIGTERM and SIGINT let the update finish, save, and return with interrupted=True; a SIGTERM to one of several
    processes stops all of them at the same update.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        CheckpointError: nothing can be saved, or no checkpoint can be read.
        InUseError: another process trains in this workdir.
        LostHostError: another process of this run is gone.
        ValueError: the processes of this run have different configs, tokenizers or data.
    """
    hosts.check_same("config, tokenizer or text", job.meta)  # before anything is written
    with lock.hold(Path(workdir) / lock.NAME) if hosts.is_first() else contextlib.nullcontext():
        return _run(job, train, workdir, checkpoints)


def _run(job: TrainLoop, train: Train, workdir: Path | str, checkpoints: Checkpoints) -> Result:
    clock = Clock()
    # 1. The state and the data's position: restored, or initial.
    with clock.spend("start"):
        step, state = _restore(job, checkpoints, train.steps)
    first, saved, stopped = step, step or None, False
    with (
        _Interrupt() as interrupt,
        _closing(checkpoints),
        contextlib.closing(Metrics(workdir, step)) as metrics,
        contextlib.closing(ProgressBar(step, train.steps, lambda step: _cost(job, clock, step - first))) as progress,
    ):
        pending = _Pending(train, metrics, progress, checkpoints)
        if step == 0 and metrics.best is None and (train.init or train.early_stopping_patience):
            with clock.spend("evaluate"):
                _evaluate(job, state, step, metrics)  # what the run begins with
            if train.early_stopping_patience and metrics.best is None:
                raise ValueError("train.early_stopping_patience needs held-out data: set data.val_fraction above 0")
        stopped = _is_over(train, metrics, checkpoints)
        while step < train.steps and not stopped and not interrupt.requested():
            # 2. The next batches, and their position in the data. After a run that was stopped between two calls, the
            #    first call is shorter: all counts of steps are multiples of steps_per_call.
            count = train.steps_per_call - step % train.steps_per_call
            with clock.spend("data"):
                position = job.batches.get_state()
                batches = [next(job.batches) for _ in range(count)]
            # 3. The updates; the device works while this thread goes on.
            with clock.spend("compile") if step == first else contextlib.nullcontext():
                state, values = job.step(state, job.key, job.put(_stacked(batches)), job.constants)
            step += count
            # 4. The metrics of the call before last: checked, written, shown.
            pending.add(step, values, position)
            # 5. Held-out data.
            if step == train.steps or (train.eval_every and step % train.eval_every == 0):
                pending.drain()
                with clock.spend("evaluate"):
                    _evaluate(job, state, step, metrics)
                stopped = _is_over(train, metrics, checkpoints)
            # 6. A checkpoint, if all metrics so far are finite; the last one comes in 7.
            best = train.early_stopping_patience and metrics.best[0] == step
            if step < train.steps and not stopped and (best or step % checkpoints.options.save_every == 0):
                pending.drain()
                with clock.spend("save"):
                    checkpoints.save(step, state, job.batches.get_state(), job.meta)
                saved = step
        # 7. The last checkpoint, whole on disk before the run reports it.
        pending.drain()
        with clock.spend("save"):
            if saved != step:
                checkpoints.save(step, state, job.batches.get_state(), job.meta)
            checkpoints.wait()
    return Result(
        steps=step,
        interrupted=step < train.steps and not stopped,
        values=metrics.last,
        tokens_per_s=progress.tokens_per_s,
        seconds=clock.total,
        checkpoint=checkpoints.path(step),
        spent=clock.seconds,
        goodput=clock.goodput,
        mfu=clock.utilisation(lambda: job.flops() * (step - first)),
        best_step=metrics.best[0] if train.early_stopping_patience else None,
    )


def _is_over(train: Train, metrics: Metrics, checkpoints: Checkpoints) -> bool:
    """Whether the held-out loss has not fallen for long enough; keeps the checkpoint of the lowest."""
    if not train.early_stopping_patience:
        return False
    step, since = metrics.best
    checkpoints.keep(step)
    if since >= train.early_stopping_patience:
        log.info("stops: no lower held-out loss than at step %d in %d evaluations", step, since)
    return since >= train.early_stopping_patience


def _cost(job: TrainLoop, clock: Clock, updates: int) -> dict[str, float]:
    """MFU (if known) and goodput, for the log."""
    used = clock.utilisation(lambda: job.flops() * updates)
    return {**({} if used is None else {"MFU": used}), "goodput": clock.goodput}


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[None]:
    """Lets the last save finish, unless another process is gone, without which it can't."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            reason = " ".join(str(error).split())[:200]
            message = f"another host is lost, or a device failed: see its log ({reason})"
            raise hosts.LostHostError(message) from error
        checkpoints.close()
        raise
    except BaseException:
        checkpoints.close()
        raise
    checkpoints.close()


def _restore(job: TrainLoop, checkpoints: Checkpoints, steps: int) -> tuple[int, TrainState]:
    restored = checkpoints.restore(job.abstract)
    if restored is None:
        return 0, job.initial()
    if restored.step > steps:
        where = checkpoints.path(restored.step)
        raise CheckpointError(f"{where} is beyond train.steps={steps}: raise train.steps, or use another workdir")
    job.batches.set_state(restored.data)
    done = "; nothing is left to do" if restored.step == steps else ""
    log.info("resumed at step %d from %s%s", restored.step, checkpoints.path(restored.step), done)
    return restored.step, restored.state


def _evaluate(job: TrainLoop, state: TrainState, step: int, metrics: Metrics) -> None:
    params = state.params if state.ema_params is None else state.ema_params
    values = job.evaluate(params)
    if not values:  # no data is held out
        return
    metrics.write(step, values)
    log.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def _stacked(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)


class _Pending:
    """Metrics still on the device, fetched IN_FLIGHT calls later, so that an accelerator never waits for the host.

    A CPU has no call queued: each would hold scratch memory of its own from then on, and the host takes no time.
    """

    def __init__(self, train: Train, metrics: Metrics, progress: ProgressBar, checkpoints: Checkpoints):
        self._every, self._steps = train.log_every, train.steps
        self._metrics, self._progress, self._checkpoints = metrics, progress, checkpoints
        self._calls, self._in_flight = deque(), 0 if platform() == "cpu" else IN_FLIGHT

    def add(self, step: int, values: dict[str, Array], position: Any) -> None:
        """Takes the metrics [S] of the call that ended at `step`, whose batches began at `position`."""
        self._calls.append((step, values, position))
        while len(self._calls) > self._in_flight:
            self._fetch()

    def drain(self) -> None:
        """Fetches all. Raises NonFiniteError."""
        while self._calls:
            self._fetch()

    def _fetch(self) -> None:
        last, values, position = self._calls.popleft()
        values = jax.device_get(values)
        count = len(values["loss"])
        for i in range(count):
            step = last - count + 1 + i
            row = {name: float(value[i]) for name, value in values.items()}
            if not row.pop("finite"):
                raise NonFiniteError(self._message(step, row, position))
            self._progress.show(step, row["loss"], row["targets"])
            if step % self._every == 0 or step == self._steps:
                self._metrics.write(step, row)
                self._metrics.show(step, self._progress.speeds(step))

    def _message(self, step: int, row: dict[str, float], position: Any) -> str:
        self._checkpoints.wait()  # one may be in progress
        good = self._checkpoints.steps()
        kept = f"the last good checkpoint is {self._checkpoints.path(good[-1])}" if good else "no checkpoint before it"
        return (
            f"step {step}: loss {row['loss']} with gradient norm {row['grad_norm']} is not finite; "
            f"its batch: {json.dumps(position)}; {kept}; nothing was saved after it"
        )


class _Interrupt:
    """Records a SIGTERM or SIGINT; a second one acts at once."""

    def __enter__(self) -> "_Interrupt":
        self._seen, self._asked = False, 0
        # With several processes jax.distributed handles SIGTERM and agrees on a step; threads can't set handlers.
        ours = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)} if ours else {}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def requested(self) -> bool:
        """Whether to stop before the next update; the n-th answer is the same on every host."""
        if jax.process_count() > 1:
            self._asked += 1  # JAX waits for one particular number, so none may be skipped
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._seen

    def _note(self, *_) -> None:
        self._seen = True
        self._restore()
        log.warning("asked to stop: finishing the update and saving")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
