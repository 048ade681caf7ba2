"""Paired timing of several cases on a machine that other processes use too.

Cases alternate, so that a noisy minute slows all of them. Reported are medians, and the median of the
ratios within each round. The ratio of the fastest repeats and processor seconds are reported as well: other processes
slow a case whose threads spin (PyTorch's OpenMP) most, and the median ratio then favours the other case.
"""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each repeat: wall clock, and processor time (user and system, all threads)."""

    walls: tuple[float, ...]
    cpus: tuple[float, ...]

    @property
    def wall(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.walls)

    @property
    def best(self) -> float:
        """The fastest repeat, in seconds."""
        return min(self.walls)

    @property
    def cpu(self) -> float:
        """The median, in processor seconds."""
        return statistics.median(self.cpus)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a benchmark: a measurement, or the reason why there is none.

    reference   the value it is compared with, in the same unit
    ratio       how many times better than the reference (for speed: the median over rounds)
    best_ratio  the same, of each case's fastest repeat
    target      what the ratio or the value should be, in words
    cpu_s       processor seconds of one repeat; reference_cpu_s: those of the reference
    """

    name: str
    value: float | None = None
    unit: str = ""
    reference: float | None = None
    ratio: float | None = None
    best_ratio: float | None = None
    target: str = ""
    cpu_s: float | None = None
    reference_cpu_s: float | None = None
    note: str = ""
    skipped: str = ""


def alternate(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times all cases `repeats` times, after one call of each for compilation.

    The order changes every round, since a case finds the processor's caches as the previous one left them. JAX arrays
    in a case's result are waited for; anything else that it starts must be finished when it returns.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    for case in cases.values():
        jax.block_until_ready(case())
    orders = random.Random(0)
    rounds = [{name: clocked(cases[name]) for name in orders.sample(list(cases), len(cases))} for _ in range(repeats)]
    return {
        name: Timing(walls=tuple(r[name][0] for r in rounds), cpus=tuple(r[name][1] for r in rounds)) for name in cases
    }


def times_faster(ours: Timing, theirs: Timing) -> float:
    """The median over rounds of seconds of `theirs` / seconds of `ours`; both from one call of `alternate`."""
    return statistics.median(theirs / ours for ours, theirs in zip(ours.walls, theirs.walls, strict=True))


def compared(row: Row, ours: Timing, theirs: Timing, amount: float) -> Row:
    """The row of `ours` with `theirs` as its reference, both from one call of `alternate`.

    Args:
        amount: what one repeat of each processes, such as tokens; the reference is in amounts per second.
    """
    return dataclasses.replace(
        row,
        reference=amount / theirs.wall,
        ratio=times_faster(ours, theirs),
        best_ratio=theirs.best / ours.best,
        reference_cpu_s=None if row.cpu_s is None else theirs.cpu,
    )


def updates(job: Any, seconds: float = 4.0) -> tuple[float, float]:
    """Seconds of a `TrainLoop`'s first update, with compilation; and mean seconds of the updates that follow it for
    `seconds`, loading included."""

    def update(state):
        batch = jax.tree.map(lambda a: a[None], next(job.batches))
        return jax.block_until_ready(job.step(state, job.key, job.put(batch), job.constants))[0]

    begun, made = time.perf_counter(), 0
    state = update(job.initial())
    compiled = time.perf_counter()
    while not made or time.perf_counter() - compiled < seconds:
        state, made = update(state), made + 1
    return compiled - begun, (time.perf_counter() - compiled) / made


def table(rows: list[Row]) -> str:
    """The rows as text, one line each, in aligned columns."""
    cells = [("", "value", "unit", "reference", "ratio", "best ratio", "target", "cpu s", "reference cpu s", "")]
    for r in rows:
        value, reference, *ratios = map(_number, (r.value, r.reference, r.ratio, r.best_ratio))
        seconds = map(_number, (r.cpu_s, r.reference_cpu_s))
        said = f"skipped: {r.skipped}" if r.skipped else r.note
        cells.append((r.name, value, r.unit, reference, *ratios, r.target, *seconds, said))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def provenance() -> dict[str, Any]:
    """Where and when something was measured: hardware, versions, date (UTC)."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
    versions = {name: version for name in packages if (version := _version(name))}
    return {
        "hardware": f"{_processor()}, {len(os.sched_getaffinity(0))} cores; {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def clocked(case: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call, by the wall clock and of the processor. A case of another process (`turns`) says its own."""
    if elsewhere := getattr(case, "clocked", None):
        return elsewhere()
    cpu, wall = _cpu_seconds(), time.perf_counter()
    jax.block_until_ready(case())
    return time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
