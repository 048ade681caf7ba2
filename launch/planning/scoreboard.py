"""Which kind of model solves which planning task: trains each (task, kind, seed), evaluates it, writes one table.

    python -m launch.planning.scoreboard --tasks=sudoku4,path --kinds=ar,masked --budget=2 --workdir=runs/board

--config names a file that takes TASK-KIND (configs/planning). Each run has a folder TASK-KIND-SEED in --workdir with
its checkpoints, its predictions and a summary. A second call with more tasks, kinds, seeds, decodings or steps trains
and evaluates only what is missing; a run that was interrupted resumes. All checkpoints (checkpoint.save_every) are
evaluated, for the plot by training examples. launch.planning.rescore counts saved predictions again.

The results are scoreboard.md, scoreboard.svg, for tasks on a grid one picture a run, and a JSON object with the table's
rows, the last line on standard output.

The decodings commit the most probable tokens, at different positions. confidence and entropy: where the network is
surest, by the highest probability or the lowest entropy. random: the ancestral sampler of the reverse process. remask:
the same, masking committed tokens again (ReMDM). revise: half of the steps as confidence, then the least confident
pairs are masked and predicted again. --best_of=8 samples so many answers by confidence, and keeps the one with the
highest likelihood or ELBO under the network itself (best of 8) and the most frequent one (vote of 8).
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

from diffusion_lm import lock
from diffusion_lm.build import build, load_for_inference
from diffusion_lm.config import Config, load, override
from diffusion_lm.planning.results import Prediction, Setting, read_predictions, write_predictions
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
from launch.planning.results_table import PREDICTIONS, SUMMARY

FLAGS = Flags(command.FLAGS)
TASKS = FLAGS.list("tasks", ["sudoku4"], "Tasks of the config file.")
KINDS = FLAGS.list("kinds", ["ar", "masked"], "Kinds of models of the config file.")
CONFIG = FLAGS.string("config", "configs/planning/m1.py", "Config file that takes TASK-KIND.")
BUDGET = FLAGS.float("budget", 2, "Minutes of training a run, compilation included. 0: the config's train.steps.", 0)
SEEDS = FLAGS.integer("seeds", 1, "Number of seeds of each task and kind: 0, 1, ...", 1)
SETTINGS = FLAGS.multi_string("set", [], "KEY=VALUE for every run, as in optim.lr=1e-3; may be repeated.")
TESTS = FLAGS.multi_string(
    "test", [], "TASK=FILE: tests in the public format, never trained on; may be repeated. Default: the task's own."
)
EXAMPLES = FLAGS.integer("examples", 500, "Number of tests of a task; of a file, the first ones.", 1)
DENOISING_STEPS = FLAGS.list("denoising_steps", "1,2,4,8,16", "Numbers of denoising steps, each for a whole answer.")
DECODINGS = FLAGS.list("decodings", "confidence", f"Some of {', '.join(decodings.DECODINGS)}.")
BEST_OF = FLAGS.integer(
    "best_of",
    0,
    "Sampled answers of which best-of-N and a vote keep one; they share the denoising steps. 0: neither.",
    0,
)
SHOW = FLAGS.integer(
    "show", None, "Index of the test whose grid is drawn, from 0. Default: the one with the most blanks.", 0
)
OUT = FLAGS.string("out", None, "Folder for the table and the pictures. Default: the workdir.")
WORKDIR = FLAGS.workdir()

TEST_SEED = 1
SAVES = 4  # checkpoints of a run with a time budget

log = logging.getLogger("diffusion_lm.scoreboard")


def main() -> dict:
    command.needs("matplotlib", "viz", "scoreboard.svg")
    steps = _denoising_steps()
    if unknown := set(DECODINGS.value) - set(decodings.DECODINGS):
        raise ValueError(f"--decodings={unknown.pop()} is none of {', '.join(decodings.DECODINGS)}")
    if BEST_OF.value == 1:
        raise ValueError("--best_of must be at least 2, or 0 for neither; got 1")
    if SHOW.value is not None and SHOW.value >= EXAMPLES.value:
        raise ValueError(f"--show must be below --examples: 0 to {EXAMPLES.value - 1}; got {SHOW.value}")
    runs = itertools.product(TASKS.value, KINDS.value, range(SEEDS.value))
    configs = {run: _config(*run) for run in runs}  # every error is reported before the first update
    out = Path(OUT.value or WORKDIR.value)
    out.mkdir(parents=True, exist_ok=True)
    with lock.hold(Path(WORKDIR.value) / lock.NAME):
        found = []
        for (task, kind, seed), config in configs.items():
            folder = Path(WORKDIR.value) / f"{task}-{kind}-{seed}"
            if not (folder / SUMMARY).exists() and not _train(folder, config):
                return {"interrupted": True, "runs": len(found)}
            wanted = decodings.settings(config.objective, DECODINGS.value, steps, BEST_OF.value)
            _evaluate_earlier(folder, config, results_table.representative(config.data.task, wanted))
            _evaluate(folder, config, wanted)
            found.append(results_table.read(folder, config.data.task, task, kind))
            results_table.write(found, out)
            results_plots.write(found, out / "scoreboard.svg")
            results_table.picture(folder, config.data.task, out)
        return {
            "rows": [row._asdict() for results in found for row in results.rows],
            "table": str(out / "scoreboard.md"),
            "plots": str(out / "scoreboard.svg"),
        }


def _denoising_steps() -> list[int]:
    asked = DENOISING_STEPS.value
    steps = sorted({int(n) for n in asked if n.isdecimal() and int(n) > 0})
    if len(steps) != len(asked):
        raise ValueError(f"--denoising_steps takes different positive integers, as in 1,4,16; got {','.join(asked)}")
    return steps


def _config(task: str, kind: str, seed: int) -> Config:
    files = dict(test.partition("=")[::2] for test in TESTS.value)
    if unknown := files.keys() - set(TASKS.value):
        raise ValueError(f"--test={unknown.pop()}=...: not one of --tasks={','.join(TASKS.value)}")
    config = override(load(f"{CONFIG.value}:{task}-{kind}"), [*SETTINGS.value, f"seed={seed}"])
    saves = max(SAVES, config.train.steps // config.checkpoint.save_every)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, test=files.get(task)),
        checkpoint=dataclasses.replace(config.checkpoint, max_to_keep=saves),  # all are evaluated
    )


def _train(folder: Path, config: Config) -> bool:
    """Trains a run and writes its summary; False if it was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _within_budget(folder, config)
    run = build(config, folder / "run")
    trained = loop.run(run.job, config.train, folder / "run", run.checkpoints)
    taken = folder / "seconds.json"  # of all calls together
    seconds = trained.seconds + (json.loads(taken.read_text()) if taken.exists() else 0)
    write_whole(taken, json.dumps(seconds).encode())
    if trained.interrupted:
        return False
    summary = {
        "seed": config.seed,
        "steps": trained.steps,
        "examples": trained.steps * config.train.batch_size,
        "parameters": parameter_count(run.job.abstract.params),
        "train_seconds": round(seconds, 1),
        "evaluation_seconds": 0.0,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "date": time.strftime("%Y-%m-%d"),
    }
    _write(folder / SUMMARY, summary)
    return True


def _evaluate_earlier(folder: Path, config: Config, wanted: list[Setting]) -> None:
    """Evaluates each checkpoint but the last."""
    for step in Checkpoints(folder / "run").steps()[:-1]:
        path = results_table.predictions_of_step(folder, step)
        found, missing = _missing(path, wanted)
        if missing:
            log.info("the checkpoint of step %d", step)
            model = load_for_inference(folder / "run", step=step)
            evaluated = decodings.evaluate(model, _tests(config, path, found), missing)
            write_predictions(path, [*found, *(p for one in evaluated for p in one.predictions)])


def _missing(path: Path, wanted: list[Setting]) -> tuple[list[Prediction], list[Setting]]:
    """The predictions in a file, and the settings that it lacks."""
    found = read_predictions(path) if path.exists() else []
    known = {one.setting for one in found}
    return found, [setting for setting in wanted if setting not in known]


def _evaluate(folder: Path, config: Config, wanted: list[Setting]) -> None:
    """Evaluates the last checkpoint in each setting that is missing, and adds the results to the run's files."""
    path = folder / PREDICTIONS
    found, missing = _missing(path, wanted)
    if not missing:
        return
    tests, summary = _tests(config, path, found), json.loads((folder / SUMMARY).read_text())
    model, started = load_for_inference(folder / "run"), time.perf_counter()
    before, shown = summary["evaluation_seconds"], results_table.shown_test(tests, SHOW.value)
    for one in decodings.evaluate(model, tests, missing, best_of=BEST_OF.value, shown=shown):
        decoding, steps = one.setting
        log.info("%s, %d denoising steps", decoding, steps)
        summary["evaluation_seconds"] = round(before + time.perf_counter() - started, 1)
        if one.remasking:
            summary.setdefault("remasking", {}).setdefault(decoding, {})[steps] = one.remasking._asdict()
        if one.frames:
            results_table.keep_frames(folder, one.setting, tests[shown], one.frames)
        _write(folder / SUMMARY, summary)
        found += one.predictions
        write_predictions(path, found)  # last: a setting that is in it is complete


def _write(path: Path, value: dict) -> None:
    write_whole(path, json.dumps(value, indent=1).encode())


def _within_budget(folder: Path, config: Config) -> Config:
    """The config with as many steps as fit --budget: measured once, and kept for a run that resumes."""
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
    """The updates that fit so many seconds, compilation included. ValueError if none does."""
    once = dataclasses.replace(config, train=dataclasses.replace(config.train, steps_per_call=1))
    started = time.perf_counter()
    job = build(once, folder / "timing").job  # writes nothing
    built = time.perf_counter() - started
    first, step = updates(job)
    steps = math.floor((seconds - built - first) / step)
    if steps < 1:
        raise ValueError(
            f"--budget={seconds / 60:g} minutes are too few for one update: compiling takes {built + first:.0f} s"
        )
    log.info("%.0f ms an update: %d updates in %.0f s", 1000 * step, steps, seconds)
    return steps


def _tests(config: Config, path: Path, found: list[Prediction]) -> list[Example]:
    """The tests. ValueError if the predictions found in a file are of other tests."""
    data = config.data
    if data.test is not None:
        tests = data.task.read(data.test)[: EXAMPLES.value]
    else:
        tests = base.test_examples(data.task, TEST_SEED, EXAMPLES.value)
    if found and [one.prompt for one in found if one.setting == found[0].setting] != [test.prompt for test in tests]:
        raise ValueError(f"{path} holds other tests: give the same --examples and --test, or another --workdir")
    return tests


if __name__ == "__main__":
    command.run(main, FLAGS)
