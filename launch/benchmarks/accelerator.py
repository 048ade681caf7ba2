"""The suite "accelerator": what a few minutes of one GPU or TPU are spent on, in order of worth.

Each leg has a process and a time limit of its own, so that a compilation that hangs, memory that runs out or a crash
takes neither the other legs nor its own earlier rows along. This process never starts the accelerator: a leg finds its
memory free. The file is replaced by a longer one after each leg.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from diffusion_lm import files
from diffusion_lm.sharding import platform
from diffusion_lm.training.clock import BANDWIDTH, PEAK
from launch.benchmarks import timing
from launch.benchmarks.accelerator_cases import Measured, sizes_here
from launch.benchmarks.timing import Row

_GRACE = 5  # seconds after its limit at which a leg ends by itself, should this process be gone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leg:
    """One part of the suite.

    share   of the time, relative to the other legs'; what a leg leaves goes to those after it
    target  module:function, (sizes, seconds left) -> rows, as they are measured
    """

    share: float
    target: str


SUITE = {
    "smoke": Leg(share=0.12, target="launch.benchmarks.accelerator_legs:smoke"),
    "train": Leg(share=0.26, target="launch.benchmarks.accelerator_legs:train"),
    "sample": Leg(share=0.37, target="launch.benchmarks.accelerator_sampling:sample"),
    "loss": Leg(share=0.07, target="launch.benchmarks.accelerator_legs:loss"),
    "learn": Leg(share=0.18, target="launch.benchmarks.accelerator_legs:learn"),
}


def accelerator(minutes: float, out: Path | None = None, legs: Mapping[str, Leg] = SUITE) -> dict[str, Any]:
    """Runs the legs in order.

    Args:
        minutes: that all legs have together.
        out: file that holds the result so far after each leg; None for none.
        legs: by name.

    Returns:
        Where and when (see `timing.provenance`), the device's peak, and all rows. "complete" says that every leg had
        its turn; a leg that failed or was stopped has a row that says why.
    """
    end, result = time.monotonic() + 60 * minutes, {"minutes": minutes, "complete": False, "rows": []}
    _replace(out, result)
    names = list(legs)
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, leg) in enumerate(legs.items()):
            limit = max(end - time.monotonic(), 0) * leg.share / sum(legs[n].share for n in names[i:])
            print(f"measuring {name} for at most {limit:.0f} s", file=sys.stderr, flush=True)
            machine, rows = _in_process(name, leg, limit, Path(folder))
            print(timing.table([Measured(**row) for row in rows]), file=sys.stderr, flush=True)
            result = {**machine, **result, "complete": i + 1 == len(legs), "rows": [*result["rows"], *rows]}
            _replace(out, result)
    return result


def _replace(out: Path | None, result: dict[str, Any]) -> None:
    """Puts a whole file in the place of the last one: whenever this process ends, one of the two is there."""
    if out is None:
        return
    new = out.with_name(f".{out.name}.new")
    with files.named(out):
        new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(new, out)


def _in_process(name: str, leg: Leg, limit: float, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the leg said of the machine, and its rows, of which the last says why it ended early, if it did."""
    said, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    said.touch()
    arguments = leg.target, time.monotonic() + limit, str(said)
    code = f"from {__name__} import in_this_process; in_this_process(*{arguments})"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=output, stderr=output, env=_environment(folder), start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
            why = "" if not status else f"ended with status {status}" if status > 0 else f"ended by signal {-status}"
        except subprocess.TimeoutExpired:
            why = f"was stopped at its limit of {limit:.0f} s"
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [json.loads(line) for line in said.read_text().splitlines(keepends=True) if line.endswith("\n")]
    rows = [line["row"] | {"leg": name} for line in lines if "row" in line]
    if why or not rows:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        print("\n".join(last[-30:]), file=sys.stderr, flush=True)
        after = f" after {rows[-1]['name']!r}" if rows else " before its first row"
        because = f": {last[-1].strip()[:300]}" if last else ""
        rows.append(_plain(Measured(name=name, leg=name, skipped=f"the leg {why or 'ended'}{after}{because}")))
    machines = [line["machine"] for line in lines if "machine" in line]
    return machines[0] if machines else {}, rows


def _environment(folder: Path) -> dict[str, str]:
    """Variables of a leg's process: it imports what this one can, and shares its cache of compiled programs. What it
    leaves behind, stopped, goes with `folder`."""
    added = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "TMPDIR": str(folder)}
    if jax.config.jax_compilation_cache_dir:
        added["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    if not any(name.endswith("CLIENT_MEM_FRACTION") for name in os.environ):
        added["XLA_CLIENT_MEM_FRACTION"] = "0.92"  # a leg is alone; the default is three quarters
    return os.environ | added


# ---- in a leg's process ----


def in_this_process(target: str, deadline: float, path: str) -> None:
    """Runs a leg and writes each row as a line of JSON; `deadline` on the clock of `time.monotonic`."""
    signal.alarm(max(1, math.ceil(deadline - time.monotonic()) + _GRACE))
    with open(path, "a", encoding="utf-8") as file:

        def say(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        sizes, kind = sizes_here(), jax.devices()[0].device_kind
        peak = {"peak_flops": PEAK.get(kind), "memory_bandwidth": BANDWIDTH.get(kind)}
        say(machine=timing.provenance() | {"platform": platform(), "sizes": sizes.name} | peak)
        module, _, function = target.partition(":")
        rows: Callable[..., Iterator[Row]] = getattr(importlib.import_module(module), function)
        for row in rows(sizes, lambda: deadline - time.monotonic()):
            say(row=_plain(row))


def _plain(row: Row) -> dict[str, Any]:
    """The row for JSON, which has no word for numbers that aren't finite."""
    values = dataclasses.asdict(row)
    wrong = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        said = f"not finite: {', '.join(f'{name} {values[name]}' for name in wrong)}"
        values |= dict.fromkeys(wrong) | {"skipped": "; ".join(filter(None, [values["skipped"], said]))}
    return values
