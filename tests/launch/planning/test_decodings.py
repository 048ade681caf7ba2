"""The ways in which the scoreboard asks, on an untrained network: what each costs, leaves out and keeps."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from diffusion_lm.build import LoadedModel, build_model
from diffusion_lm.config import load, override
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from diffusion_lm.planning.data import char_tokenizer
from diffusion_lm.planning.results import Way, write_predictions
from diffusion_lm.planning.tasks import base
from diffusion_lm.planning.tasks.countdown import Countdown
from diffusion_lm.planning.tasks.queens import Queens
from launch.planning import decodings, results_plots, results_table

TINY = ("model.width=16", "model.layers=1", "model.heads=2", "model.mlp_dim=16")


@pytest.fixture(scope="module")
def model():
    config = override(load("configs/planning/m1.py:sudoku4-masked"), TINY)
    tokenizer = char_tokenizer(config.data.task.alphabet)
    module, process = build_model(config, tokenizer)
    shapes, rng = (
        nn.meta.unbox(jax.eval_shape(lambda: init_params(module, jax.random.key(0)))),
        np.random.default_rng(0),
    )
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return LoadedModel(config, tokenizer, process, BoundModel(module=module, params=params), 0, None, {})


def kinds(name):
    return load(f"configs/planning/m1.py:sudoku4-{name}").objective


def test_a_network_is_asked_in_the_ways_it_learnt():
    asked = {name: decodings.wanted(kinds(name), ["random"], [1, 4], 3) for name in ("ar", "masked", "joint")}
    assert asked["ar"] == [("tokens", 0)]
    canvases = [(name, passes) for name in ("random", "best of 3", "vote of 3") for passes in (1, 4)]
    assert asked["masked"] == canvases and asked["joint"] == [("tokens", 0), *canvases]
    assert [way.decoding for way in decodings.wanted(kinds("masked"), ["random"], [1], 0)] == ["random"]


def test_what_is_asked_for_is_what_comes_and_costs_what_it_says(model, quick_compile, caplog):
    caplog.set_level("INFO")
    tests = base.test_examples(model.config.data.task, 1, 3)
    ways = [Way("revise", 2), Way("revise", 6), Way("random", 4), Way("vote of 3", 2), Way("vote of 3", 6)]
    found = list(decodings.ask(model, tests, ways, best_of=3, shown=1))
    assert [one.way for one in found] == [ways[1], ways[2], ways[4]]  # and no best of 3, which has been asked
    assert "revise: 2 passes are too few" in caplog.text and "vote of 3: 2 passes are too few" in caplog.text
    revised, random, vote = found
    assert all([p[:2] for p in one.predictions] == [t[:2] for t in tests] for one in found)
    assert random.predictions[0].nfe == 4 and vote.predictions[0].nfe == 3 * 2 and revised.predictions[0].nfe <= 6
    assert len(random.frames) == 4 and random.takebacks is None and vote.frames is None and len(revised.frames) == 6
    assert 0 < revised.takebacks.positions <= 3 * 17
    stood = [sum(bool(text) for text in frame) for frame in random.frames]
    assert stood == sorted(stood) and stood[-1] == 17
    for one in (revised, random):  # the last frame is the answer
        assert "".join(one.frames[-1]).split("∎")[0] == one.predictions[1].prediction


def test_the_shown_test_is_a_grid_the_one_with_most_blanks_unless_chosen():
    queens = [base.Example(prompt, "2413") for prompt in ("2013", "2000", "0010")]
    assert results_table.shown(queens) == 1 and results_table.shown(queens, 2) == 2
    assert results_table.shown(base.test_examples(Countdown(), 1, 2), 1) is None
    with pytest.raises(ValueError, match="--show=3: the tests' numbers are 0 to 2"):
        results_table.shown(queens, 3)


def test_a_decoding_is_drawn_in_the_most_passes_it_was_asked_for(tmp_path):
    test, out = base.Example("2000", "2413"), tmp_path / "out"
    cell = tmp_path / "queens-masked-0"
    cell.mkdir(), out.mkdir()
    results_table.picture(cell, Queens(size=4), out)
    assert not list(out.iterdir())  # nothing was asked yet
    for passes in (2, 4, 1):
        frames = [[*"2", "", "", "", ""]] * (passes - 1) + [[*"2413", "∎"]]
        results_table.keep_frames(cell, Way("random", passes), test, frames)
    results_table.picture(cell, Queens(size=4, given=1), out)
    assert "random, 4 passes: solved" in (out / "queens-masked-0.svg").read_text()


def test_rows_and_charts_say_which_decoding(tmp_path):
    task, cell = Queens(size=4, given=1), tmp_path / "cell"
    cell.mkdir()
    takebacks = {"revise": {"8": {"positions": 4, "times": 31, "mended": 21, "spoiled": 11, "other": 0, "wrong": 41}}}
    said = {"seed": 0, "steps": 1, "examples": 1, "parameters": 1, "train_seconds": 1, "hardware": "x", "date": "y"}
    (cell / "cell.json").write_text(json.dumps({**said, "takebacks": takebacks}))
    ways = [("tokens", 0), ("confidence", 8), ("revise", 8)]
    right = decodings.Prediction("2000", "2413", "2413", "", 0, 5)
    write_predictions(cell / "predictions.jsonl", [right._replace(decoding=d, passes=p) for d, p in ways])
    found = results_table.read(cell, task, "queens", "joint")
    assert [(row.decoding, row.passes) for row in found.rows] == ways and all(r.solved[0] == 1 for r in found.rows)
    assert not found.learning and {hard for hard, _ in found.difficulty} == {1}
    results_table.write([found], tmp_path)
    lines = [line.split(" | ") for line in (tmp_path / "scoreboard.md").read_text().splitlines()[2:5]]
    assert [line[3:5] for line in lines] == [["token by token", ""], ["confidence", "8"], ["revise", "8"]]
    assert lines[2][9:14] == ["31", "41", "", "21", "11"] and lines[1][9:14] == [""] * 5
    path = tmp_path / "scoreboard.svg"
    results_plots.write([found], path)
    for text in ("queens, joint", "token by token", "confidence", "revise"):
        assert f"<!-- {text} -->" in path.read_text()
    results_plots.write([found._replace(rows=found.rows[:2])], path)
    page = path.read_text()
    assert "<!-- queens -->" in page and "<!-- joint, token by token -->" in page and "<!-- joint -->" in page


def test_what_stands_for_a_network_where_few_ways_can():
    """The passes beyond an answer's positions would commit nothing more."""
    task, ways = Queens(size=4), [Way("tokens", 0), *(Way("random", p) for p in (1, 4, 1000)), Way("revise", 5)]
    assert results_table.standing(task, ways) == [ways[0], ways[2]]
    assert (
        results_table.standing(task, [Way("random", 64)]) == [Way("random", 64)]
        and results_table.standing(task, ways[:1]) == ways[:1]
    )
