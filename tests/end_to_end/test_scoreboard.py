"""The scoreboard's launcher: what it leaves behind, what it does not do twice, and that its counts can be checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ("model.width=16", "model.layers=1", "model.heads=2", "model.mlp=16", "train.steps=2", "train.batch=4",
        "checkpoint.every=2", "data.valid=2")  # fmt: skip


def launch(module, *flags):
    quick = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what it runs is tiny
    command = [sys.executable, "-m", f"launch.{module}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout.splitlines(), done.stderr


def board(folder, *flags):
    settings = [f"--set={s}" for s in TINY]
    place = [f"--workdir={folder}", "--budget=0", "--examples=6", "--passes=3"]
    return launch("scoreboard", *settings, *place, *flags)  # a later flag overrides


def test_a_row_for_each_way_that_can_be_counted_again_and_is_not_made_twice(tmp_path):
    code, out, err = board(tmp_path, "--tasks=sudoku4", "--models=joint")
    assert code == 0, err
    said = json.loads(out[-1])["rows"]
    rows = {row["passes"]: row for row in said}
    assert set(rows) == {0, 3}
    assert rows[3]["nfe"] <= 4 and rows[0]["nfe"] <= 17  # one pass reads the prompt
    for row in said:
        assert row["tests"] == 6 and row["steps"] == 2 and row["examples"] == 8
        assert 0 <= row["solved"][1] <= row["solved"][0] <= row["solved"][2] <= 1
    table = (tmp_path / "scoreboard.md").read_text().splitlines()
    assert sum(line.startswith("| sudoku4 |") for line in table) == 2
    assert "<svg" in (tmp_path / "scoreboard.svg").read_text()

    path = tmp_path / "sudoku4-joint-0/predictions.jsonl"
    assert len(path.read_text().splitlines()) == 12
    code, out, err = launch("rescore", "--task=sudoku4", f"--predictions={path}")
    assert code == 0, err
    for passes, counted in json.loads(out[-1]).items():
        found = counted["verified"]
        assert [found["count"] / found["total"], found["low"], found["high"]] == rows[int(passes)]["solved"]

    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    code, out, err = launch("rescore", "--task=sudoku4", f"--predictions={path}", "--by=0")
    assert code == 0, err
    apart = {int(blanks): counted for blanks, counted in json.loads(out[-1]).items()}
    assert list(apart) == sorted({prompt.count("0") for prompt in prompts}) and len(apart) > 1
    for blanks, counted in apart.items():
        assert set(counted) == {"0", "3"}
        assert sum(c["exact"]["total"] for c in counted.values()) == sum(p.count("0") == blanks for p in prompts)

    cell = tmp_path / "sudoku4-joint-0/cell.json"
    before = cell.stat().st_mtime_ns
    code, out, _ = board(tmp_path, "--tasks=sudoku4", "--models=joint")
    assert code == 0 and json.loads(out[-1])["rows"] == said and cell.stat().st_mtime_ns == before


def test_a_cell_keeps_the_steps_that_were_measured_first(tmp_path):
    """What goes on after a stop must end where it would have ended."""
    (tmp_path / "sudoku4-ar-0").mkdir()
    (tmp_path / "sudoku4-ar-0/steps.json").write_text('{"steps": 9}')
    code, out, err = board(tmp_path, "--models=ar", "--budget=1")
    assert code == 0, err
    assert [row["steps"] for row in json.loads(out[-1])["rows"]] == [8]  # four checkpoints


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tasks=chess"], "task 'chess' is none of"),
        (["--passes=0"], "--passes=0"),
        (["--test=path=x.jsonl"], "not one of --tasks"),
        (["--test=sudoku4=nothing.csv"], "nothing.csv"),
        (["--budget=-1"], "--budget"),
        (["--budget=0.0001"], "don't hold one update"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, said):
    code, out, err = board(tmp_path, "--models=ar", *flags)
    assert code == 2 and not out and said in err.splitlines()[-1]
