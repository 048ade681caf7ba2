"""The scoreboard's decodings on an untrained network: what each costs, skips and keeps."""

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
from diffusion_lm.planning.remasking_stats import RemaskingStats
from diffusion_lm.planning.results import Prediction, Setting, write_predictions
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


def test_settings_follow_the_objective():
    found = {name: decodings.settings(kinds(name), ["random"], [1, 4], 3) for name in ("ar", "masked", "joint")}
    assert found["ar"] == [("autoregressive", 0)]
    denoising = [(name, steps) for name in ("random", "best of 3", "vote of 3") for steps in (1, 4)]
    assert found["masked"] == denoising and found["joint"] == [("autoregressive", 0), *denoising]
    assert [setting.decoding for setting in decodings.settings(kinds("masked"), ["random"], [1], 0)] == ["random"]


def test_each_setting_costs_its_steps_and_too_few_are_skipped(model, caplog):
    caplog.set_level("INFO")
    tests = base.test_examples(model.config.data.task, 1, 3)
    wanted = [
        Setting("revise", 2),
        Setting("revise", 6),
        Setting("random", 4),
        Setting("vote of 3", 2),
        Setting("vote of 3", 6),
    ]
    found = list(decodings.evaluate(model, tests, wanted, best_of=3, shown=1))
    assert [one.setting for one in found] == [wanted[1], wanted[2], wanted[4]]  # best of 3 was not requested
    assert (
        "revise: 2 denoising steps are too few" in caplog.text
        and "vote of 3: 2 denoising steps are too few" in caplog.text
    )
    revised, random, vote = found
    assert all([p[:2] for p in one.predictions] == [t[:2] for t in tests] for one in found)
    assert random.predictions[0].nfe == 4 and vote.predictions[0].nfe == 3 * 2 and revised.predictions[0].nfe <= 6
    assert len(random.frames) == 4 and random.remasking is None and vote.frames is None and len(revised.frames) == 6
    assert 0 < revised.remasking.positions <= 3 * 17
    committed = [sum(bool(text) for text in frame) for frame in random.frames]
    assert committed == sorted(committed) and committed[-1] == 17
    for one in (revised, random):  # the last frame is the answer
        assert "".join(one.frames[-1]).split("∎")[0] == one.predictions[1].prediction


def test_the_shown_test_is_the_grid_with_most_blanks_unless_chosen():
    queens = [base.Example(prompt, "2413") for prompt in ("2013", "2000", "0010")]
    assert results_table.shown_test(queens) == 1 and results_table.shown_test(queens, 2) == 2
    assert results_table.shown_test(base.test_examples(Countdown(), 1, 2), 1) is None
    with pytest.raises(ValueError, match="--show must be the index of a test, 0 to 2; got 3"):
        results_table.shown_test(queens, 3)


def test_a_decoding_is_drawn_with_its_most_denoising_steps(tmp_path):
    test, out = base.Example("2000", "2413"), tmp_path / "out"
    run = tmp_path / "queens-masked-0"
    run.mkdir(), out.mkdir()
    results_table.picture(run, Queens(size=4), out)
    assert not list(out.iterdir())  # nothing was evaluated yet
    for steps in (2, 4, 1):
        frames = [[*"2", "", "", "", ""]] * (steps - 1) + [[*"2413", "∎"]]
        results_table.keep_frames(run, Setting("random", steps), test, frames)
    results_table.picture(run, Queens(size=4, given=1), out)
    assert "random, 4 steps: solved" in (out / "queens-masked-0.svg").read_text()


def test_rows_and_plots_name_the_decoding(tmp_path):
    task, run = Queens(size=4, given=1), tmp_path / "run"
    run.mkdir()
    counts = RemaskingStats(
        positions=4, changes=31, corrected=21, broken=11, still_wrong=0, first_wrong=41, wrong_remasked=40
    )
    summary = {"seed": 0, "steps": 1, "examples": 1, "parameters": 1, "train_seconds": 1, "hardware": "x", "date": "y"}
    remasking = {"revise": {"8": counts._asdict()}}
    (run / "summary.json").write_text(json.dumps({**summary, "remasking": remasking}))
    settings = [("autoregressive", 0), ("confidence", 8), ("revise", 8)]
    predictions = [Prediction("2000", "2413", "2413", *setting, nfe=5) for setting in settings]
    write_predictions(run / "predictions.jsonl", predictions)
    found = results_table.read(run, task, "queens", "joint")
    assert [(row.decoding, row.denoising_steps) for row in found.rows] == settings
    assert all(row.solved[0] == 1 for row in found.rows)
    assert not found.learning and {hard for hard, _ in found.difficulty} == {1}
    results_table.write([found], tmp_path)
    lines = [line.split(" | ") for line in (tmp_path / "scoreboard.md").read_text().splitlines()[2:5]]
    assert [line[3:5] for line in lines] == [["autoregressive", ""], ["confidence", "8"], ["revise", "8"]]
    assert lines[2][9:14] == ["31", "41", "40", "21", "11"] and lines[1][9:14] == [""] * 5
    path = tmp_path / "scoreboard.svg"
    results_plots.write([found], path)
    for text in ("queens, joint", "autoregressive", "confidence", "revise"):
        assert f"<!-- {text} -->" in path.read_text()
    results_plots.write([found._replace(rows=found.rows[:2])], path)
    page = path.read_text()
    assert "<!-- queens -->" in page and "<!-- joint, autoregressive -->" in page and "<!-- joint -->" in page


def test_representative_settings():
    """Autoregressive, and the most steps up to an answer's positions."""
    task, settings = (
        Queens(size=4),
        [Setting("autoregressive", 0), *(Setting("random", n) for n in (1, 4, 1000)), Setting("revise", 5)],
    )
    assert results_table.representative(task, settings) == [settings[0], settings[2]]
    assert (
        results_table.representative(task, [Setting("random", 64)]) == [Setting("random", 64)]
        and results_table.representative(task, settings[:1]) == settings[:1]
    )
