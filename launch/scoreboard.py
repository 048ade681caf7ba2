"""Which kind of network solves which task: trains every (task, kind, seed), asks each, writes one table and one page.

    python -m launch.scoreboard --tasks=sudoku4,path --models=ar,masked --budget=2 --workdir=runs/board --out=runs/board

--config names the file whose argument is TASK-KIND (configs/planning). Each cell has a folder in --workdir: its run,
the predictions, and what it took. Started again with more tasks, kinds or seeds it trains only what is missing, and a
cell that was cut off goes on from its checkpoint. --test=TASK=FILE asks a public file, of which nothing is trained on;
otherwise the task's own tests are asked. launch.rescore counts predictions again. The last line on standard output is
a JSON object with the table's rows.
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
from absl import flags

from diffusion_lm import generate
from diffusion_lm.build import Model, Run, build, load_for_inference
from diffusion_lm.config import Config, load, override
from diffusion_lm.evaluation.accuracy import Prediction, write_predictions
from diffusion_lm.evaluation.speed import updates
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.tasks import base
from diffusion_lm.tasks.base import Example
from diffusion_lm.training import loop
from diffusion_lm.visualize.page import write_whole
from launch import board
from launch import flags as launch_flags

TASKS = flags.DEFINE_list("tasks", ["sudoku4"], "Tasks of the config file.")
MODELS = flags.DEFINE_list("models", ["ar", "masked"], "Kinds of the config file.")
CONFIG = flags.DEFINE_string("config", "configs/planning/m1.py", "Config file that takes TASK-KIND.")
BUDGET = flags.DEFINE_float("budget", 2, "Minutes of training a cell, compilation included; 0: the config's steps.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, ... of each cell.")
SETTINGS = flags.DEFINE_multi_string("set", [], "KEY=VALUE for every cell, as in optim.lr=1e-3.")
TESTS = flags.DEFINE_multi_string("test", [], "TASK=FILE in the public format.")
EXAMPLES = flags.DEFINE_integer("examples", 500, "Test examples to ask; of a file, the first ones.")
PASSES = flags.DEFINE_list("passes", ["1", "2", "4", "8", "16"], "Denoising passes an answer, in all.")
OUT = flags.DEFINE_string("out", None, "Folder for scoreboard.md and scoreboard.svg; none: the workdir.")
WORKDIR = launch_flags.define_workdir()

TEST_SEED = 1
BATCH = 250  # prompts at a time
SAVES = 4  # checkpoints of a cell that is trained for a time

log = logging.getLogger("diffusion_lm.scoreboard")


def main() -> dict:
    if BUDGET.value < 0 or SEEDS.value < 1 or EXAMPLES.value < 1:
        raise ValueError("--budget can't be negative, and --seeds and --examples are at least 1")
    passes = sorted({int(p) for p in PASSES.value if p.isdigit() and int(p) > 0})
    if len(passes) != len(PASSES.value):
        raise ValueError(f"--passes={','.join(PASSES.value)}: give different numbers of 1 and more")
    out = Path(OUT.value or WORKDIR.value)
    out.mkdir(parents=True, exist_ok=True)
    cells = list(itertools.product(TASKS.value, MODELS.value, range(SEEDS.value)))
    configs = {cell: _config(*cell) for cell in cells}  # whatever is wrong with one is said before any is trained
    rows = []
    for (task, kind, seed), config in configs.items():
        folder = Path(WORKDIR.value) / f"{task}-{kind}-{seed}"
        if not (folder / "cell.json").exists() and not _fill(folder, config, passes):
            return {"interrupted": True, "cells": len(rows)}
        rows += board.rows(folder, config.data.task, task, kind)
        board.write(rows, out)
    return {
        "rows": [row._asdict() for row in rows],
        "table": str(out / "scoreboard.md"),
        "page": str(out / "scoreboard.svg"),
    }


def _config(task: str, kind: str, seed: int) -> Config:
    files = dict(test.partition("=")[::2] for test in TESTS.value)
    if unknown := files.keys() - set(TASKS.value):
        raise ValueError(f"--test={unknown.pop()}=...: not one of --tasks={','.join(TASKS.value)}")
    config = override(load(f"{CONFIG.value}:{task}-{kind}"), [*SETTINGS.value, f"seed={seed}"])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, test=files.get(task)))


def _fill(folder: Path, config: Config, passes: list[int]) -> bool:
    """Trains a cell and asks it; False if it was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _timed(folder, config)
    run = build(config, folder / "run")
    trained = loop.run(run.job, config.train, folder / "run", run.checkpoints)
    taken = folder / "seconds.json"  # in all, however often it was cut off
    seconds = trained.seconds + (json.loads(taken.read_text()) if taken.exists() else 0)
    write_whole(taken, json.dumps(seconds).encode())
    if trained.interrupted:
        return False
    model, started = load_for_inference(folder / "run"), time.perf_counter()
    predictions = ask(model, _tests(run), passes)
    write_predictions(folder / "predictions.jsonl", predictions)
    cell = {
        "seed": config.seed,
        "steps": trained.steps,
        "examples": trained.steps * config.train.batch,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.bound.params)),
        "train_seconds": round(seconds, 1),
        "ask_seconds": round(time.perf_counter() - started, 1),
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "date": time.strftime("%Y-%m-%d"),
    }
    write_whole(folder / "cell.json", json.dumps(cell, indent=1).encode())
    return True


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
        checkpoint=dataclasses.replace(config.checkpoint, every=every),
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


def _tests(run: Run) -> list[Example]:
    data = run.config.data
    if data.test is not None:
        return list(run.text.tests[: EXAMPLES.value])
    return base.test_examples(data.task, TEST_SEED, EXAMPLES.value)


def ask(model: Model, tests: list[Example], passes: list[int]) -> list[Prediction]:
    """What the likeliest tokens answer, in each way that the network learnt to write."""
    length = model.config.data.task.longest[1] + 1
    found = []
    for asked, writer in _writers(model, length, passes).items():
        for first in range(0, len(tests), BATCH):
            some = tests[first : first + BATCH]
            answer = generate.write(model, writer, [test.prompt for test in some], length=length, seed=0)
            nfe = int(answer.generation.nfe)
            found += [Prediction(*test, text, asked, nfe) for test, text in zip(some, answer.texts, strict=True)]
    return found


def _writers(model: Model, length: int, passes: list[int]) -> dict:
    """By the passes asked for, which the canvases of an answer share; 0 is token by token."""
    objective, draw = model.config.objective, Draw(temperature=0, suppressed=model.tokenizer.suppressed)
    writers = {0: generate.autoregressive(model, draw=draw)} if objective.causal else {}
    if objective.canvas != 1:
        parts = generate.confidence(model, draw=draw, canvas=0, passes=1).canvases(length) if objective.canvas else 1
        for total in passes:
            if total >= parts:
                writers[total] = generate.confidence(model, draw=draw, canvas=0, passes=total // parts)
    return writers


if __name__ == "__main__":
    launch_flags.run(main)
