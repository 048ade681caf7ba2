"""Whether drawing examples keeps updates waiting: updates on examples that are drawn as training draws them, beside the
same updates on one batch again and again."""

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

log = logging.getLogger("diffusion_lm.feeding")
FED = ("sudoku4", "sudoku9", "countdown4", "sat7", "path", "queens")
UPDATES = 8  # a leg: more than the batches that are drawn ahead
DRAWN = 8000  # examples that are drawn alone; the latter half is clocked, when a task's tables are there
WORKERS = 8  # processes that draw, beside an accelerator


def feeding() -> list[Row]:
    """A row a task: at 0.87M parameters on CPUs, at 5.4M elsewhere."""
    alone = jax.default_backend() == "cpu"
    file, workers = ("configs/planning/m1.py", 0) if alone else ("configs/planning/m6.py", WORKERS)
    return [fed(task, override(load(f"{file}:{task}-masked"), [f"data.workers={workers}"])) for task in FED]


def fed(name: str, config: Config, drawn: int = DRAWN, repeats: int = 3) -> Row:
    """Examples/s of updates that draw theirs, held against updates that don't."""
    log.info("drawing %s", name)
    rate = _rate(config.data.task, drawn)
    with tempfile.TemporaryDirectory() as folder:
        job = build(config, folder).job
    again = next(job.batches)
    legs = {"drawn": Updates(job, job.batches), "again": Updates(job, itertools.repeat(again))}
    timings = timing.alternate(legs, repeats=repeats)
    ours, theirs, examples = timings["drawn"], timings["again"], UPDATES * config.train.batch_size
    slower = 1 / timing.times_faster(ours, theirs)
    row = Row(
        name=f"feed {name}, batch {config.train.batch_size}",
        value=examples / ours.wall,
        unit="examples/s",
        target="ratio >= 0.95",
        cpu_s=ours.cpu,
        note=f"an update takes {slower:.2f} of its time on one batch; one core draws {rate:,.0f} examples/s",
    )
    return timing.beside(row, ours, theirs, examples)


class Updates:
    """Some updates a call, one behind the other as the training loop has them."""

    def __init__(self, job: TrainLoop, batches: Iterator):
        self._job, self._batches, self._state = job, batches, job.initial()

    def __call__(self) -> None:
        for _ in range(UPDATES):
            batch = jax.tree.map(lambda a: a[None], next(self._batches))
            self._state, _ = self._job.step(self._state, self._job.key, self._job.put(batch))
        jax.block_until_ready(self._state)


def _rate(task: Task, drawn: int) -> float:
    """Examples/s of one core that does nothing else."""
    examples = base.examples(task, 0)
    for _ in range(drawn // 2):
        next(examples)
    begun = time.perf_counter()
    for _ in range(drawn // 2):
        next(examples)
    return drawn // 2 / (time.perf_counter() - begun)
