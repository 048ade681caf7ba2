"""Benchmarks whether generating examples delays updates: updates on generated examples against updates on one batch."""

import itertools
import logging
import tempfile
import time
from collections.abc import Iterator

import jax

from diffusion_lm.build import build
from diffusion_lm.config import Config, load, override
from diffusion_lm.planning.tasks import base
from diffusion_lm.planning.tasks.base import Task
from diffusion_lm.training.loop import TrainLoop
from launch.benchmarks import timing
from launch.benchmarks.timing import Row

log = logging.getLogger("diffusion_lm.data_loading")
TASKS = ("sudoku4", "sudoku9", "countdown4", "sat7", "path", "queens")
UPDATES = 8  # in one case: more than the batches that are generated ahead
GENERATED = 8000  # examples generated without training; the latter half is timed, when a task's tables exist
WORKERS = 8  # processes that generate examples for an accelerator


def data_loading() -> list[Row]:
    """A row for each task: with 0.87M parameters on CPUs, with 5.4M on an accelerator."""
    alone = jax.default_backend() == "cpu"
    file, workers = ("configs/planning/m1.py", 0) if alone else ("configs/planning/m6.py", WORKERS)
    return [loading(task, override(load(f"{file}:{task}-masked"), [f"data.workers={workers}"])) for task in TASKS]


def loading(name: str, config: Config, generated: int = GENERATED, repeats: int = 3) -> Row:
    """Examples/s of updates on generated examples, compared with updates on one batch."""
    log.info("generating %s", name)
    rate = _rate(config.data.task, generated)
    with tempfile.TemporaryDirectory() as folder:
        job = build(config, folder).job
    repeated = itertools.repeat(next(job.batches))
    cases = {"generated": Updates(job, job.batches), "repeated": Updates(job, repeated)}
    timings = timing.alternate(cases, repeats=repeats)
    ours, theirs, examples = timings["generated"], timings["repeated"], UPDATES * config.train.batch_size
    slower = 1 / timing.times_faster(ours, theirs)
    row = Row(
        name=f"data loading, {name}, batch {config.train.batch_size}",
        value=examples / ours.wall,
        unit="examples/s",
        target="ratio >= 0.95",
        cpu_s=ours.cpu,
        note=f"an update takes {slower:.2f} times as long as on one batch; one core generates {rate:,.0f} examples/s",
    )
    return timing.compared(row, ours, theirs, examples)


class Updates:
    """A case of UPDATES updates that are dispatched one after the other, as in training."""

    def __init__(self, job: TrainLoop, batches: Iterator):
        self._job, self._batches, self._state = job, batches, job.initial()

    def __call__(self) -> None:
        for _ in range(UPDATES):
            batch = jax.tree.map(lambda a: a[None], next(self._batches))
            self._state, _ = self._job.step(self._state, self._job.key, self._job.put(batch), self._job.constants)
        jax.block_until_ready(self._state)


def _rate(task: Task, generated: int) -> float:
    """Examples/s that one core generates when it does nothing else."""
    examples = base.examples(task, 0)
    for _ in range(generated // 2):
        next(examples)
    begun = time.perf_counter()
    for _ in range(generated // 2):
        next(examples)
    return generated // 2 / (time.perf_counter() - begun)
