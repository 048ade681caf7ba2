"""Chain family beside the others, on a model small enough to train in seconds: a table, a figure, and going on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_lm.build import load_for_inference

ROOT = Path(__file__).parents[2]
TEXT = "\n\n".join(f"Line {i}: the {word} sat on the mat." for i in range(80) for word in ("cat", "dog", "hen"))
STUDENT = "distilled:objective.num_timesteps=1"
SMALL = [f"--set={s}" for s in ("model.width=16", "model.layers=1", "model.heads=2", "train.batch_size=4")]


def compare(folder, *arguments):
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HOME": str(folder)}
    command = [sys.executable, "-m", "launch.compare", f"--data={folder}/text.txt", f"--workdir={folder}/work"]
    command += ["--texts=4", "--passes=2", "--budget=0.001", "--seed=3", *SMALL, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | quick, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    (folder / "text.txt").write_text(TEXT)
    done = compare(folder, f"--families={STUDENT},masked,ar", f"--out={folder}/out", "--figure=svg")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_line_for_each_family_and_for_the_text(compared):
    folder, result = compared
    ar, masked, student, text = result["rows"]
    assert [line["family"] for line in (ar, masked, student, text)] == ["ar", "masked", STUDENT, "the text itself"]
    assert ar["standard_error"] == 0 < masked["standard_error"] and result["steps"] >= 10
    assert ar["samples"]["64"]["nfe"] == 64 and masked["samples"]["2"]["nfe"] == 2
    lines = (folder / "out/table.md").read_text().splitlines()
    assert len(lines) == 6 and f"{ar['bits_per_byte']:.3f} ± 0.000" in lines[2] and "| 64 passes |" in lines[0]
    assert "</svg>" in (folder / "out/figure.svg").read_text()


def test_the_seed_is_the_runs(compared):
    assert [load_for_inference(compared[0] / "work" / family).config.seed for family in ("ar", "masked")] == [3, 3]


def test_a_student_has_its_settings_and_learned_from_its_teacher(compared):
    work = compared[0] / "work"
    objective = load_for_inference(work / STUDENT).config.objective
    assert (objective.num_timesteps, objective.teacher) == (1, str(work / "masked"))


def changed(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_started_again_it_goes_on_and_a_failure_keeps_its_row(compared):
    """Nothing that is known is made again: neither a network nor what it costs, nor its samples."""
    folder, result = compared
    ar, masked, _, text = result["rows"]
    (folder / "work/uniform").mkdir()
    (folder / "work/uniform/record.json").write_text('{"failed": "loss nan"}')
    for known in (masked["samples"]["2"], text["samples"]["64"]):
        known["entropy"] = 9.0
    changed(folder / "work/masked/record.json", lambda record: record["samples"]["canvas/2"].update(entropy=9.0))
    changed(folder / "work/ar/record.json", lambda record: record["text"].update(entropy=9.0))
    done = compare(folder, "--families=ar,masked,uniform,distilled_uniform")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    left = {"family": "distilled_uniform", "failed": "its teacher, uniform, failed"}
    assert again["rows"] == [ar, masked, {"family": "uniform", "failed": "loss nan"}, left, text]
    assert "| uniform | failed: loss nan |" in (folder / "work/table.md").read_text()
    assert [path.name for path in (folder / "work/uniform").iterdir()] == ["record.json"]


def test_the_seed_is_the_samples_too(compared):
    """The same networks, asked again with another."""
    folder, result = compared
    changed(folder / "work/plan.json", lambda plan: plan.update(seed=4))
    changed(folder / "work/masked/record.json", lambda record: record.pop("samples"))
    done = compare(folder, "--families=ar,masked", "--seed=4")
    assert done.returncode == 0, done.stderr
    ar, masked, _ = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert ar == result["rows"][0] and masked["bits_per_byte"] == result["rows"][1]["bits_per_byte"]
    assert masked["samples"]["2"]["nats_per_token"] != result["rows"][1]["samples"]["2"]["nats_per_token"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--families=masked"], "needs ar"),
        (["--passes=0,2"], "--passes takes"),
        (["--families=ar,other"], "kind 'other' is none of"),
        (["--families=ar,distilled"], "distilled needs a teacher"),
        (["--seed=5"], "use a new one"),
    ],
)
def test_bad_input_is_one_line(compared, arguments, cause):
    done = compare(compared[0], *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert cause in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
