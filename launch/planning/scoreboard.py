"""Which kind of network solves which task: trains every (task, kind, seed), asks each, writes one table and one page.

    python -m launch.planning.scoreboard --tasks=sudoku4,path --models=ar,masked --budget=2 --workdir=runs/board --out=runs/board

--config names the file whose argument is TASK-KIND (configs/planning). Each cell has a folder in --workdir: its run,
the predictions, and what it took. Started again with more tasks, kinds, seeds, decodings or passes it trains and asks
only what is missing, and a cell that was cut off goes on from its checkpoint. --test=TASK=FILE asks a public file, of
which nothing is trained on; otherwise the task's own tests are asked. The checkpoints along the way (checkpoint.save_every)
are asked too, for the page's curves by examples seen. launch.planning.rescore counts predictions again. The last line on
standard output is a JSON object with the table's rows.

--decodings: which positions are written when. confidence and entropy: the surest first, by the likeliest token's
probability or by the least entropy. random: the reverse process. remask: that, with tokens taken back (ReMDM). revise:
half of the passes as confidence, then the least sure pairs again. --best_of=8 draws so many answers by confidence, and
keeps the best by the network's own reading (best of 8) and the most frequent (vote of 8); they share the passes.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import time
from pathlib import Path

import jax

from diffusion_lm.build import build, load_for_inference
from diffusion_lm.config import Config, load, override
from diffusion_lm.planning.results import Prediction, Way, read_predictions, write_predictions
from diffusion_lm.planning.tasks import base
from diffusion_lm.planning.tasks.base import Example
from diffusion_lm.training import loop
from diffusion_lm.training.checkpoint import Checkpoints
from diffusion_lm.training.state import parameter_count
from diffusion_lm.visualize.page import write_whole
from launch import command
from launch.benchmarks.timing import updates
from launch.flags import Flags
from launch.planning import decodings, results_plots, results_table

FLAGS = Flags(command.FLAGS)
TASKS = FLAGS.list("tasks", ["sudoku4"], "Tasks of the config file.")
MODELS = FLAGS.list("models", ["ar", "masked"], "Kinds of the config file.")
CONFIG = FLAGS.string("config", "configs/planning/m1.py", "Config file that takes TASK-KIND.")
BUDGET = FLAGS.float("budget", 2, "Minutes of training a cell, compilation included; 0: the config's steps.")
SEEDS = FLAGS.integer("seeds", 1, "Seeds 0, 1, ... of each cell.")
SETTINGS = FLAGS.multi_string("set", [], "KEY=VALUE for every cell, as in optim.lr=1e-3.")
TESTS = FLAGS.multi_string("test", [], "TASK=FILE in the public format.")
EXAMPLES = FLAGS.integer("examples", 500, "Test examples to ask; of a file, the first ones.")
PASSES = FLAGS.list("passes", ["1", "2", "4", "8", "16"], "Denoising passes an answer, in all.")
DECODINGS = FLAGS.list("decodings", ["confidence"], f"Some of {', '.join(decodings.DECODINGS)}.")
BEST_OF = FLAGS.integer("best_of", 0, "Also the best of so many drawn answers, and their vote; 0: neither.")
SHOW = FLAGS.integer("show", None, "Number of the test, from 0, whose grid is drawn; none: of the most blanks.")
OUT = FLAGS.string("out", None, "Folder for the table, the page and the pictures; none: the workdir.")
WORKDIR = FLAGS.workdir()

TEST_SEED = 1
SAVES = 4  # checkpoints of a cell that is trained for a time

log = logging.getLogger("diffusion_lm.scoreboard")


def main() -> dict:
    if BUDGET.value < 0 or SEEDS.value < 1 or EXAMPLES.value < 1:
        raise ValueError("--budget can't be negative, and --seeds and --examples are at least 1")
    passes = sorted({int(p) for p in PASSES.value if p.isdigit() and int(p) > 0})
    if len(passes) != len(PASSES.value):
        raise ValueError(f"--passes={','.join(PASSES.value)}: give different numbers of 1 and more")
    if unknown := set(DECODINGS.value) - set(decodings.DECODINGS):
        raise ValueError(f"--decodings={unknown.pop()}: none of {', '.join(decodings.DECODINGS)}")
    if BEST_OF.value < 0 or BEST_OF.value == 1:
        raise ValueError(f"--best_of={BEST_OF.value}: the best of 2 answers or more; 0 for none")
    if SHOW.value is not None and not 0 <= SHOW.value < EXAMPLES.value:
        raise ValueError(f"--show={SHOW.value}: name one of the --examples, 0 to {EXAMPLES.value - 1}")
    out = Path(OUT.value or WORKDIR.value)
    out.mkdir(parents=True, exist_ok=True)
    cells = list(itertools.product(TASKS.value, MODELS.value, range(SEEDS.value)))
    configs = {cell: _config(*cell) for cell in cells}  # whatever is wrong with one is said before any is trained
    found = []
    for (task, kind, seed), config in configs.items():
        folder = Path(WORKDIR.value) / f"{task}-{kind}-{seed}"
        if not (folder / "cell.json").exists() and not _train(folder, config):
            return {"interrupted": True, "cells": len(found)}
        wanted = decodings.wanted(config.objective, DECODINGS.value, passes, BEST_OF.value)
        _ask_earlier(folder, config, results_table.standing(config.data.task, wanted))
        _ask(folder, config, wanted)
        found.append(results_table.read(folder, config.data.task, task, kind))
        results_table.write(found, out)
        results_plots.write(found, out / "scoreboard.svg")
        results_table.picture(folder, config.data.task, out)
    return {
        "rows": [row._asdict() for cell in found for row in cell.rows],
        "table": str(out / "scoreboard.md"),
        "page": str(out / "scoreboard.svg"),
    }


def _config(task: str, kind: str, seed: int) -> Config:
    files = dict(test.partition("=")[::2] for test in TESTS.value)
    if unknown := files.keys() - set(TASKS.value):
        raise ValueError(f"--test={unknown.pop()}=...: not one of --tasks={','.join(TASKS.value)}")
    config = override(load(f"{CONFIG.value}:{task}-{kind}"), [*SETTINGS.value, f"seed={seed}"])
    saves = max(SAVES, config.train.steps // config.checkpoint.save_every)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, test=files.get(task)),
        checkpoint=dataclasses.replace(config.checkpoint, max_to_keep=saves),  # all are asked
    )


def _train(folder: Path, config: Config) -> bool:
    """Trains a cell; False if it was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _timed(folder, config)
    run = build(config, folder / "run")
    trained = loop.run(run.job, config.train, folder / "run", run.checkpoints)
    taken = folder / "seconds.json"  # in all, however often it was cut off
    seconds = trained.seconds + (json.loads(taken.read_text()) if taken.exists() else 0)
    write_whole(taken, json.dumps(seconds).encode())
    if trained.interrupted:
        return False
    cell = {
        "seed": config.seed,
        "steps": trained.steps,
        "examples": trained.steps * config.train.batch_size,
        "parameters": parameter_count(run.job.abstract.params),
        "train_seconds": round(seconds, 1),
        "ask_seconds": 0.0,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "date": time.strftime("%Y-%m-%d"),
    }
    _write(folder / "cell.json", cell)
    return True


def _ask_earlier(folder: Path, config: Config, ways: list[Way]) -> None:
    """Asks each checkpoint but the last."""
    for step in Checkpoints(folder / "run").steps()[:-1]:
        path = results_table.of_step(folder, step)
        found, missing = _asked(path, ways)
        if missing:
            log.info("the checkpoint of step %d", step)
            model = load_for_inference(folder / "run", step=step)
            asked = decodings.ask(model, _tests(config, path, found), missing)
            write_predictions(path, [*found, *(p for one in asked for p in one.predictions)])


def _asked(path: Path, ways: list[Way]) -> tuple[list[Prediction], list[Way]]:
    """The predictions that there are, and the ways that are missing."""
    found = read_predictions(path) if path.exists() else []
    asked = {one.way for one in found}
    return found, [way for way in ways if way not in asked]


def _ask(folder: Path, config: Config, wanted: list[Way]) -> None:
    """Asks a cell in each way in which it was not asked yet, and keeps what each gave."""
    path = folder / results_table.PREDICTIONS
    found, missing = _asked(path, wanted)
    if not missing:
        return
    tests, cell = _tests(config, path, found), json.loads((folder / "cell.json").read_text())
    model, begun = load_for_inference(folder / "run"), time.perf_counter()
    before, shown = cell["ask_seconds"], results_table.shown(tests, SHOW.value)
    for one in decodings.ask(model, tests, missing, best_of=BEST_OF.value, shown=shown):
        log.info("%s, %d passes", *one.way)
        cell["ask_seconds"] = round(before + time.perf_counter() - begun, 1)
        if one.takebacks:
            cell.setdefault("takebacks", {}).setdefault(one.way.decoding, {})[one.way.passes] = one.takebacks._asdict()
        if one.frames:
            results_table.keep_frames(folder, one.way, tests[shown], one.frames)
        _write(folder / "cell.json", cell)
        found += one.predictions
        write_predictions(path, found)  # last: what is in it has been asked


def _write(path: Path, value: dict) -> None:
    write_whole(path, json.dumps(value, indent=1).encode())


def _timed(folder: Path, config: Config) -> Config:
    """The config with as many steps as the budget holds: measured once, and kept for a run that goes on."""
    if not BUDGET.value:
        return config
    known = folder / "steps.json"
    if not known.exists():
        write_whole(known, json.dumps({"steps": _steps(folder, config, 60 * BUDGET.value)}).encode())
    calls = max(json.loads(known.read_text())["steps"] // (SAVES * config.train.steps_per_call), 1)
    every = calls * config.train.steps_per_call
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=SAVES * every),
        checkpoint=dataclasses.replace(config.checkpoint, save_every=every),
    )


def _steps(folder: Path, config: Config, seconds: float) -> int:
    """How many steps fit into so many seconds, compilation included. ValueError if none does."""
    once = dataclasses.replace(config, train=dataclasses.replace(config.train, steps_per_call=1))
    begun = time.perf_counter()
    job = build(once, folder / "timing").job  # an empty folder: nothing is written
    built = time.perf_counter() - begun
    first, step = updates(job)
    steps = math.floor((seconds - built - first) / step)
    if steps < 1:
        raise ValueError(f"--budget={seconds / 60:g} minutes don't hold one update ({built + first:.0f} s to compile)")
    log.info("%.0f ms an update: %d updates in %.0f s", 1000 * step, steps, seconds)
    return steps


def _tests(config: Config, path: Path, found: list[Prediction]) -> list[Example]:
    """The tests, which are those of what was found in a file of predictions."""
    data = config.data
    if data.test is not None:
        tests = data.task.read(data.test)[: EXAMPLES.value]
    else:
        tests = base.test_examples(data.task, TEST_SEED, EXAMPLES.value)
    if found and [one.prompt for one in found if one.way == found[0].way] != [test.prompt for test in tests]:
        raise ValueError(f"{path} asks other examples: give the same --examples and --test, or another --workdir")
    return tests


if __name__ == "__main__":
    command.run(main, FLAGS)
