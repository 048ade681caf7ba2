"""Metrics of a run: WORKDIR/metrics.jsonl, TensorBoard, and a progress bar or log lines."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from diffusion_lm.training.checkpoint import OneLine
from diffusion_lm.training.hosts import is_first

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class Metrics:
    """Writes one JSON object per line, with its step. Opening at a step drops the rows of later steps."""

    def __init__(self, workdir: Path | str, step: int, tensorboard: bool = True):
        self.path = Path(workdir) / FILE
        first = is_first()  # all processes have the same metrics
        rows = _rows_until(self.path, step)
        self.last = {name: value for row in rows for name, value in row.items()}
        self._held_out = {}  # step -> loss
        for row in rows:
            self._note(row["step"], row)
        self._writing = OneLine(f"can't write {self.path}")
        if first:
            with self._writing:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _replace(self.path, rows)
        self._file = open(self.path if first else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _tensorboard(Path(workdir) / "tensorboard", step) if first and tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a row and flushes it: a checkpoint of this step must not outlive it."""
        self.last |= {"step": step, **values}
        self._note(step, values)
        with self._writing:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        self.show(step, values)

    def _note(self, step: int, values: dict[str, float]) -> None:
        parts = [value for name, value in values.items() if name.startswith("valid/")]
        if parts:
            self._held_out[step] = sum(parts)

    @property
    def best(self) -> tuple[int, int] | None:
        """The step of the lowest held-out loss, all parts together, and how many evaluations came after it; None before
        the first."""
        if not self._held_out:
            return None
        steps = list(self._held_out)
        best = min(steps, key=self._held_out.get)
        return best, len(steps) - 1 - steps.index(best)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Writes to TensorBoard only: for speeds, as rows of metrics.jsonl are reproducible."""
        if self._board is not None:
            with self._writing:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        with self._writing, contextlib.closing(self._file):
            if self._board is not None:
                self._board.close()


def read(workdir: Path | str) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, without a last line that a kill cut short."""
    return _rows_until(Path(workdir) / FILE, None)


def _rows_until(path: Path, step: int | None) -> list[dict[str, float]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            if step is None or row["step"] <= step:
                rows.append(row)
    return rows


def _replace(path: Path, rows: list[dict[str, float]]) -> None:
    """Replaces the file atomically, so that a kill loses nothing."""
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(beside, path)


def _tensorboard(folder: Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        log.info("no TensorBoard files: pip install 'diffusion_lm[viz]' to have them")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class ProgressBar:
    """Shows step, loss, tokens per second and time left: a bar on a terminal, otherwise a log line every few seconds.

    Args:
        step: where the run starts.
        steps: where it ends.
        cost: step -> shares by name, such as MFU and goodput.
        seconds_between_lines: of the log.
    """

    def __init__(
        self,
        step: int,
        steps: int,
        cost: Callable[[int], dict[str, float]] = lambda step: {},
        seconds_between_lines: float = 10.0,
    ):
        self._steps, self._cost = steps, cost
        self._started = None  # (time, step) of the first update shown: before it the run compiled
        self._tokens = 0.0
        self._pause = seconds_between_lines
        self._last_line = -float("inf")
        self._bar = _bar() if sys.stderr.isatty() and is_first() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=step)

    @property
    def tokens_per_s(self) -> float | None:
        """Targets per second since the first update; None before the second one."""
        if self._started is None or not self._tokens:
            return None
        return self._tokens / (time.monotonic() - self._started[0])

    def speeds(self, step: int) -> dict[str, float]:
        """Targets per second, of all chips and per chip, and the costs."""
        speed = self.tokens_per_s or 0.0
        return {"tokens_per_s": speed, "tokens_per_s_per_chip": speed / jax.device_count(), **self._cost(step)}

    def show(self, step: int, loss: float, tokens: float) -> None:
        """Counts the tokens of the updates up to `step`."""
        now = time.monotonic()
        if self._started is None:
            self._started = now, step
        else:
            self._tokens += tokens
        cost = self.speeds(step)
        speed, each = cost.pop("tokens_per_s"), cost.pop("tokens_per_s_per_chip")
        shares = "".join(f"  {name} {value:.1%}" for name, value in cost.items())
        each = f" ({each:,.0f} per chip)" if jax.device_count() > 1 else ""
        text = f"step {step}/{self._steps}  loss {loss:.4f}  {speed:,.0f} tokens/s{each}{shares}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last_line >= self._pause or step == self._steps:
            self._last_line = now
            log.info("%s%s", text, self._time_left(now, step))

    def close(self) -> None:
        """Stops the bar; it stays visible."""
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, now: float, step: int) -> str:
        started, first = self._started
        if step == first:
            return ""
        left = (now - started) / (step - first) * (self._steps - step)
        return f"  {left:.0f} s left"


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
