"""Each experiment of configs/planning loads and survives JSON; the kinds of a task differ in nothing else."""

import dataclasses
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from configs.planning.experiments import TASKS, kinds
from diffusion_lm.build import build
from diffusion_lm.config import from_json, load, override, to_json
from diffusion_lm.models.base import Vocabulary
from diffusion_lm.models.transformer import Transformer, init_params

FOLDER = Path(__file__).parents[2] / "configs/planning"
STATED = {"m1": 0.87e6, "m6": 5.4e6, "m85": 85e6}  # parameters, as their docstrings say
EXPERIMENTS = [f"{task}-{kind}" for task in TASKS for kind in kinds(TASKS[task])]
TINY = ["model.width=16", "model.layers=1", "model.heads=2", "model.mlp_dim=16", "train.steps=2", "train.batch_size=2"]


def config_of(size, experiment):
    return load(f"{FOLDER}/{size}.py:{experiment}")


def test_every_size_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "experiments", "quick"} == set(STATED)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_loads_and_survives_json(experiment):
    for size in STATED:
        config = config_of(size, experiment)
        assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("task", TASKS)
def test_kinds_of_a_task_differ_only_in_objective_and_row(task):
    one, *others = [config_of("m1", f"{task}-{kind}") for kind in kinds(TASKS[task])]
    for other in others:
        data = dataclasses.replace(other.data, seq_len=one.data.seq_len, task=one.data.task)
        assert dataclasses.replace(other, objective=one.objective, data=data) == one
        assert getattr(other.data.task, "task", other.data.task) == one.data.task
    assert len({(found.objective, found.data.task) for found in (one, *others)}) == len(others) + 1


@pytest.mark.parametrize("size", STATED)
def test_has_the_parameters_it_states(size):
    module = Transformer(config_of(size, "sudoku9-masked").model, Vocabulary(size=31, mask=31))
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == pytest.approx(STATED[size], rel=0.02)


@pytest.mark.parametrize(
    "experiment", [name for name in EXPERIMENTS if name.startswith("sudoku4") or name in ("countdown4-ar", "path-ar")]
)
def test_a_tiny_one_can_be_assembled(experiment, tmp_path):
    run = build(override(config_of("m1", experiment), TINY), tmp_path)
    assert next(run.job.batches).tokens.shape == (2, run.config.data.seq_len)


@pytest.mark.parametrize("experiment", ["chess-ar", "sudoku4-gan", "sudoku4"])
def test_an_unknown_experiment_is_refused(experiment):
    with pytest.raises(ValueError, match=r"planning: the .* is none of"):
        config_of("m1", experiment)


def test_a_seq_len_that_is_too_small_is_refused(tmp_path):
    config = override(config_of("m1", "sudoku4-masked"), [*TINY, "data.seq_len=33"])
    with pytest.raises(ValueError, match=r"data\.seq_len=33 is too small for the longest example: set it to 34"):
        build(config, tmp_path)
