"""The scoreboard's launcher: what it leaves behind, what it does not do twice, and that its counts can be checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ("model.width=16", "model.layers=1", "model.heads=2", "model.mlp=16", "train.steps=2", "train.batch=4",
        "checkpoint.every=2", "data.valid=2")  # fmt: skip


def launch(module, *flags):
    done = subprocess.run([sys.executable, "-m", f"launch.{module}", *flags], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


def board(folder, *flags):
    settings = [f"--set={s}" for s in TINY]
    place = [f"--workdir={folder}", "--budget=0", "--examples=6", "--passes=3"]
    return launch("scoreboard", *settings, *place, *flags)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    code, out, err = board(folder, "--tasks=sudoku4", "--models=joint")
    assert code == 0, err
    return folder, json.loads(out[-1])


def test_one_row_for_every_way_of_every_cell(made):
    folder, said = made
    rows = {row["passes"]: row for row in said["rows"]}
    assert set(rows) == {0, 3}
    assert rows[3]["nfe"] <= 4 and rows[0]["nfe"] <= 17  # one pass reads the prompt
    for row in said["rows"]:
        assert row["tests"] == 6 and row["steps"] == 2 and row["examples"] == 8
        assert 0 <= row["solved"][1] <= row["solved"][0] <= row["solved"][2] <= 1
    table = (folder / "planning.md").read_text().splitlines()
    assert sum(line.startswith("| sudoku4 |") for line in table) == 2
    assert "<svg" in (folder / "planning.svg").read_text()


def test_predictions_can_be_counted_again(made):
    folder, said = made
    path = folder / "sudoku4-joint-0/predictions.jsonl"
    code, out, err = launch("rescore", "--task=sudoku4", f"--predictions={path}")
    assert code == 0, err
    counted = json.loads(out[-1])
    for row in said["rows"]:
        found = counted[str(row["passes"])]["verified"]
        assert (found["count"] / found["total"], found["low"], found["high"]) == tuple(row["solved"])
    assert len(path.read_text().splitlines()) == 12


def test_cells_that_are_there_are_not_trained_again(made):
    folder, said = made
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/cell.json")}
    assert len(before) == 1
    code, out, _ = board(folder, "--tasks=sudoku4", "--models=joint")
    assert code == 0 and json.loads(out[-1])["rows"] == said["rows"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/cell.json")}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tasks=chess"], "task 'chess' is none of"),
        (["--passes=0"], "--passes=0"),
        (["--test=path=x.jsonl"], "not one of --tasks"),
        (["--test=sudoku4=nothing.csv"], "nothing.csv"),
        (["--budget=-1"], "--budget"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, said):
    code, out, err = board(tmp_path, "--models=ar", *flags)
    assert code == 2 and not out and said in err.splitlines()[-1]
