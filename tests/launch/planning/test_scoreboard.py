"""The scoreboard's launcher: its files, what it does only once, and counts that can be checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import call

from diffusion_lm import lock
from diffusion_lm.planning.results import read_predictions
from launch.planning import scoreboard

ROOT = Path(__file__).parents[3]
TINY = ("model.width=16", "model.layers=1", "model.heads=2", "model.mlp_dim=16", "train.steps=2", "train.batch_size=4",
        "checkpoint.save_every=2", "data.valid=2")  # fmt: skip
BOARD = ("--budget=0", "--examples=6", "--denoising_steps=3")


def launch(module, *flags):
    quick = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what it runs is tiny
    command = [sys.executable, "-m", f"launch.{module}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout.splitlines(), done.stderr


def board(folder, *flags):
    settings = [f"--set={s}" for s in TINY]
    return launch(
        "planning.scoreboard", *settings, *BOARD, f"--workdir={folder}", *flags
    )  # a later flag overrides an earlier one


def test_each_setting_has_a_row_that_can_be_counted_again_and_is_made_only_once(tmp_path):
    code, out, err = board(tmp_path, "--tasks=sudoku4", "--kinds=joint")
    assert code == 0, err
    first = json.loads(out[-1])["rows"]
    rows = {row["denoising_steps"]: row for row in first}
    assert set(rows) == {0, 3}
    assert rows[3]["nfe"] <= 4 and rows[0]["nfe"] <= 17  # one forward pass is for the prompt
    for row in first:
        assert row["tests"] == 6 and row["steps"] == 2 and row["examples"] == 8
        assert 0 <= row["solved"][1] <= row["solved"][0] <= row["solved"][2] <= 1
    table = (tmp_path / "scoreboard.md").read_text().splitlines()
    assert sum(line.startswith("| sudoku4 |") for line in table) == 2
    page = (tmp_path / "scoreboard.svg").read_text()
    assert "<!-- sudoku4, by difficulty -->" in page and "<!-- blanks -->" in page
    assert "during training" not in page  # there is only one checkpoint

    path = tmp_path / "sudoku4-joint-0/predictions.jsonl"
    assert len(path.read_text().splitlines()) == 12
    code, out, err = launch("planning.rescore", "--experiment=sudoku4-joint", f"--predictions={path}")
    assert code == 0, err
    counts = json.loads(out[-1])
    assert {decoding: list(of) for decoding, of in counts.items()} == {"autoregressive": ["0"], "confidence": ["3"]}
    for row in first:
        found = counts[row["decoding"]][str(row["denoising_steps"])]["verified"]
        assert [found["count"] / found["total"], found["low"], found["high"]] == row["solved"]

    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    code, out, err = launch(
        "planning.rescore", "--experiment=sudoku4-joint", f"--predictions={path}", "--by_difficulty"
    )
    assert code == 0, err
    apart = {int(blanks): counted for blanks, counted in json.loads(out[-1]).items()}
    assert list(apart) == sorted({prompt.count("0") for prompt in prompts}) and len(apart) > 1
    for blanks, counted in apart.items():
        assert set(counted) == {"autoregressive", "confidence"}
        totals = [c["exact"]["total"] for by_steps in counted.values() for c in by_steps.values()]
        assert sum(totals) == sum(p.count("0") == blanks for p in prompts)

    before, trained = path.read_text(), (tmp_path / "sudoku4-joint-0/run/metrics.jsonl").stat().st_mtime_ns
    more = ["--decodings=confidence,remask", "--best_of=2"]
    code, out, err = board(tmp_path, "--tasks=sudoku4", "--kinds=joint", *more)
    assert code == 0, err
    assert path.read_text().startswith(before)  # nothing is evaluated or trained again
    assert (tmp_path / "sudoku4-joint-0/run/metrics.jsonl").stat().st_mtime_ns == trained
    rows = json.loads(out[-1])["rows"]
    assert rows[:2] == first and [row["decoding"] for row in rows[2:]] == ["remask", "best of 2", "vote of 2"]
    assert all(row["tests"] == 6 and row["denoising_steps"] == 3 for row in rows[2:])
    remasking = {row["decoding"]: row["remasking"] for row in rows}
    assert remasking["confidence"] is None and remasking["remask"]["positions"] > 0
    summary = json.loads((tmp_path / "sudoku4-joint-0/summary.json").read_text())
    assert summary["remasking"]["remask"]["3"] == remasking["remask"]
    picture = (tmp_path / "sudoku4-joint-0.svg").read_text()
    assert "confidence, 3 steps" in picture and "remask, 3 steps" in picture


def test_a_run_keeps_its_measured_steps_and_each_checkpoint_is_evaluated(tmp_path):
    """A resumed run must end where it would have ended without the interruption."""
    (tmp_path / "sudoku4-ar-0").mkdir()
    (tmp_path / "sudoku4-ar-0/steps.json").write_text('{"steps": 9}')
    code, out, err = board(tmp_path, "--kinds=ar", "--budget=1")
    assert code == 0, err
    assert [row["steps"] for row in json.loads(out[-1])["rows"]] == [8]  # four checkpoints
    found = [read_predictions(tmp_path / f"sudoku4-ar-0/predictions{step}.jsonl") for step in ("-2", "-4", "-6", "")]
    assert len({tuple(one.prompt for one in some) for some in found}) == 1 and len(found[0]) == 6
    page = (tmp_path / "scoreboard.svg").read_text()
    assert (
        "<!-- sudoku4, during training -->" in page and "<!-- training examples -->" in page and "<!-- 24 -->" in page
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks=chess"], "the task 'chess' is none of"),
        (["--denoising_steps=0"], "got 0"),
        (["--test=path=x.jsonl"], "not one of --tasks"),
        (["--test=sudoku4=nothing.csv"], "nothing.csv"),
        (["--budget=-1"], "--budget"),
        (["--decodings=guess"], "--decodings=guess"),
        (["--best_of=1"], "--best_of must be at least 2"),
        (["--show=6"], "0 to 5"),
        (["--budget=0.0001"], "too few for one update"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    settings = [f"--set={s}" for s in TINY]
    status, out, err = call(capsys, scoreboard, *settings, *BOARD, f"--workdir={tmp_path}", "--kinds=ar", *flags)
    assert status == 2 and not out and message in err.splitlines()[-1]


def test_a_folder_in_use_is_left_as_it_is(tmp_path, capsys):
    settings = [f"--set={s}" for s in TINY]
    with lock.hold(tmp_path / lock.NAME):
        status, out, err = call(capsys, scoreboard, *settings, *BOARD, f"--workdir={tmp_path}", "--kinds=ar")
        assert status == 2 and not out and f"in use by process {os.getpid()}" in err.splitlines()[-1]
        assert [file.name for file in tmp_path.iterdir()] == [lock.NAME]


def test_a_missing_plotting_package_is_reported_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, out, err = call(capsys, scoreboard, f"--workdir={tmp_path / 'new'}")
    assert status == 2 and not out and "pip install 'diffusion_lm[viz]'" in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
