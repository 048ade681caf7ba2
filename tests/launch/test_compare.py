"""launch.compare on kinds small enough to train in seconds: its table, its figure, and resuming."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import call

import launch.compare
from diffusion_lm import lock
from diffusion_lm.build import load_for_inference

ROOT = Path(__file__).parents[2]
TEXT = "\n\n".join(f"Line {i}: the {word} sat on the mat." for i in range(80) for word in ("cat", "dog", "hen"))
STUDENT = "distilled:objective.student_steps=1"
SMALL = [f"--set={s}" for s in ("model.width=16", "model.layers=1", "model.heads=2", "train.batch_size=4")]


def flags(folder):
    few = ["--num_samples=4", "--denoising_steps=2", "--budget=0.001", "--seed=3", *SMALL]
    return [f"--data={folder}/text.txt", f"--workdir={folder}/work", *few]


def compare(folder, *arguments):
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HOME": str(folder)}
    command = [sys.executable, "-m", "launch.compare", *flags(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | quick, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    (folder / "text.txt").write_text(TEXT)
    done = compare(folder, f"--kinds={STUDENT},masked,ar", f"--out={folder}/out", "--figure=svg")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_line_for_each_kind_and_for_the_text(compared):
    folder, result = compared
    ar, masked, student, text = result["rows"]
    assert [line["kind"] for line in (ar, masked, student, text)] == ["ar", "masked", STUDENT, "held-out text"]
    assert ar["standard_error"] == 0 < masked["standard_error"] and result["steps"] >= 10
    assert ar["samples"]["64"]["nfe"] == 64 and masked["samples"]["2"]["nfe"] == 2
    lines = (folder / "out/table.md").read_text().splitlines()
    assert len(lines) == 6 and f"{ar['bits_per_byte']:.3f} ± 0.000" in lines[2] and "| 64 steps |" in lines[0]
    assert "</svg>" in (folder / "out/figure.svg").read_text()


def test_the_seed_is_that_of_the_runs(compared):
    assert [load_for_inference(compared[0] / "work" / kind).config.seed for kind in ("ar", "masked")] == [3, 3]


def test_a_student_has_its_settings_and_its_teacher(compared):
    work = compared[0] / "work"
    objective = load_for_inference(work / STUDENT).config.objective
    assert (objective.student_steps, objective.teacher) == (1, str(work / "masked"))


def changed(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_a_second_call_resumes_and_a_failure_keeps_its_row(compared):
    """No result is computed again: neither a network, nor its likelihood, nor its samples."""
    folder, result = compared
    ar, masked, _, text = result["rows"]
    (folder / "work/uniform").mkdir()
    (folder / "work/uniform/record.json").write_text('{"failed": "loss nan"}')
    for known in (masked["samples"]["2"], text["samples"]["64"]):
        known["entropy"] = 9.0
    changed(folder / "work/masked/record.json", lambda record: record["samples"]["canvas/2"].update(entropy=9.0))
    changed(folder / "work/ar/record.json", lambda record: record["text"].update(entropy=9.0))
    done = compare(folder, "--kinds=ar,masked,uniform,distilled_uniform")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    left = {"kind": "distilled_uniform", "failed": "its teacher, uniform, failed"}
    assert again["rows"] == [ar, masked, {"kind": "uniform", "failed": "loss nan"}, left, text]
    assert "| uniform | failed: loss nan |" in (folder / "work/table.md").read_text()
    assert [path.name for path in (folder / "work/uniform").iterdir()] == ["record.json"]


def test_the_seed_is_that_of_the_samples_too(compared):
    """The same networks, sampled again with another."""
    folder, result = compared
    changed(folder / "work/plan.json", lambda plan: plan.update(seed=4))
    changed(folder / "work/masked/record.json", lambda record: record.pop("samples"))
    done = compare(folder, "--kinds=ar,masked", "--seed=4")
    assert done.returncode == 0, done.stderr
    ar, masked, _ = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert ar == result["rows"][0] and masked["bits_per_byte"] == result["rows"][1]["bits_per_byte"]
    assert masked["samples"]["2"]["nats_per_token"] != result["rows"][1]["samples"]["2"]["nats_per_token"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--kinds=masked"], "needs ar"),
        (["--denoising_steps=0,2"], "--denoising_steps takes"),
        (["--kinds=ar,other"], "kind 'other' is none of"),
        (["--kinds=ar,distilled"], "distilled needs a teacher"),
        (["--seed=5"], "use a new one"),
    ],
)
def test_bad_input_is_one_line(compared, arguments, cause, capsys):
    status, out, err = call(capsys, launch.compare, *flags(compared[0]), *arguments)
    assert (status, out) == (2, "") and err.count("\n") == 1 and cause in err


def test_a_folder_in_use_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    with lock.hold(tmp_path / "work" / lock.NAME):
        status, out, err = call(capsys, launch.compare, *flags(tmp_path), "--kinds=ar")
        assert (status, out) == (2, "") and f"in use by process {os.getpid()}" in err.splitlines()[-1]
        assert [file.name for file in (tmp_path / "work").iterdir()] == [lock.NAME]


def test_a_figure_without_matplotlib_is_refused_before_the_first_update(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, out, err = call(capsys, launch.compare, *flags(tmp_path))
    assert (status, out) == (2, "") and "the figure needs matplotlib: pip install 'diffusion_lm[viz]'" in err
