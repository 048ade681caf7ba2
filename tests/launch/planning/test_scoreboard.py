"""The scoreboard's launcher: what it leaves behind, what it does not do twice, and that its counts can be checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_lm.planning.results import read_predictions

ROOT = Path(__file__).parents[3]
TINY = ("model.width=16", "model.layers=1", "model.heads=2", "model.mlp_dim=16", "train.steps=2", "train.batch_size=4",
        "checkpoint.save_every=2", "data.valid=2")  # fmt: skip


def launch(module, *flags):
    quick = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what it runs is tiny
    command = [sys.executable, "-m", f"launch.{module}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout.splitlines(), done.stderr


def board(folder, *flags):
    settings = [f"--set={s}" for s in TINY]
    place = [f"--workdir={folder}", "--budget=0", "--examples=6", "--passes=3"]
    return launch("planning.scoreboard", *settings, *place, *flags)  # a later flag overrides


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
    page = (tmp_path / "scoreboard.svg").read_text()
    assert "<!-- sudoku4, by difficulty -->" in page and "<!-- blanks -->" in page
    assert "as it learns" not in page  # there is but one checkpoint

    path = tmp_path / "sudoku4-joint-0/predictions.jsonl"
    assert len(path.read_text().splitlines()) == 12
    code, out, err = launch("planning.rescore", "--cell=sudoku4-joint", f"--predictions={path}")
    assert code == 0, err
    counts = json.loads(out[-1])
    assert {decoding: list(of) for decoding, of in counts.items()} == {"tokens": ["0"], "confidence": ["3"]}
    for row in said:
        found = counts[row["decoding"]][str(row["passes"])]["verified"]
        assert [found["count"] / found["total"], found["low"], found["high"]] == row["solved"]

    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    code, out, err = launch("planning.rescore", "--cell=sudoku4-joint", f"--predictions={path}", "--by_difficulty")
    assert code == 0, err
    apart = {int(blanks): counted for blanks, counted in json.loads(out[-1]).items()}
    assert list(apart) == sorted({prompt.count("0") for prompt in prompts}) and len(apart) > 1
    for blanks, counted in apart.items():
        assert set(counted) == {"tokens", "confidence"}
        totals = [c["exact"]["total"] for by_passes in counted.values() for c in by_passes.values()]
        assert sum(totals) == sum(p.count("0") == blanks for p in prompts)

    before, trained = path.read_text(), (tmp_path / "sudoku4-joint-0/run/metrics.jsonl").stat().st_mtime_ns
    more = ["--decodings=confidence,remask", "--best_of=2"]
    code, out, err = board(tmp_path, "--tasks=sudoku4", "--models=joint", *more)
    assert code == 0, err
    assert path.read_text().startswith(before)  # what was asked isn't asked again, nor trained again
    assert (tmp_path / "sudoku4-joint-0/run/metrics.jsonl").stat().st_mtime_ns == trained
    rows = json.loads(out[-1])["rows"]
    assert rows[:2] == said and [row["decoding"] for row in rows[2:]] == ["remask", "best of 2", "vote of 2"]
    assert all(row["tests"] == 6 and row["passes"] == 3 for row in rows[2:])
    taken = {row["decoding"]: row["takebacks"] for row in rows}
    assert taken["confidence"] is None and taken["remask"]["positions"] > 0
    assert (
        json.loads((tmp_path / "sudoku4-joint-0/cell.json").read_text())["takebacks"]["remask"]["3"] == taken["remask"]
    )
    picture = (tmp_path / "sudoku4-joint-0.svg").read_text()
    assert "confidence, 3 passes" in picture and "remask, 3 passes" in picture


def test_a_cell_keeps_the_steps_that_were_measured_first_and_each_checkpoint_is_asked(tmp_path):
    """What goes on after a stop must end where it would have ended."""
    (tmp_path / "sudoku4-ar-0").mkdir()
    (tmp_path / "sudoku4-ar-0/steps.json").write_text('{"steps": 9}')
    code, out, err = board(tmp_path, "--models=ar", "--budget=1")
    assert code == 0, err
    assert [row["steps"] for row in json.loads(out[-1])["rows"]] == [8]  # four checkpoints
    asked = [read_predictions(tmp_path / f"sudoku4-ar-0/predictions{step}.jsonl") for step in ("-2", "-4", "-6", "")]
    assert len({tuple(one.prompt for one in found) for found in asked}) == 1 and len(asked[0]) == 6
    page = (tmp_path / "scoreboard.svg").read_text()
    assert "<!-- sudoku4, as it learns -->" in page and "<!-- examples seen -->" in page and "<!-- 24 -->" in page


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tasks=chess"], "task 'chess' is none of"),
        (["--passes=0"], "--passes=0"),
        (["--test=path=x.jsonl"], "not one of --tasks"),
        (["--test=sudoku4=nothing.csv"], "nothing.csv"),
        (["--budget=-1"], "--budget"),
        (["--decodings=guess"], "--decodings=guess"),
        (["--best_of=1"], "--best_of=1"),
        (["--show=6"], "0 to 5"),
        (["--budget=0.0001"], "don't hold one update"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, said):
    code, out, err = board(tmp_path, "--models=ar", *flags)
    assert code == 2 and not out and said in err.splitlines()[-1]
