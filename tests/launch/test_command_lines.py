"""Random command lines over all launchers: a result that holds what was asked, or one line that says why there is none.

COMMAND_LINES=400 python -m pytest -n 0 --hypothesis-show-statistics tests/launch/test_command_lines.py

makes as many, and each time others. Two lines in three (one in five without the variable) are `meant`: their flags go
together, their values are valid, and what they begin is run to its end; one in six of them has one flag of the others,
which are drawn at `random`.
"""

import functools
import importlib
import json
import math
import os
import re
import shutil
import time

import jax
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from support.begun import drawn
from support.command_lines import DRAWN, NUMBER, SMALLEST, lines
from support.commands import SUDOKU, TEXT, call

from diffusion_lm.build import load_for_inference
from diffusion_lm.config import load, override
from diffusion_lm.convert.loading import load_source
from diffusion_lm.planning.results import Prediction, write_predictions
from launch import benchmark, quickstart, topologies


class Reached(Exception):
    """The launcher has accepted its command line and would now work for long."""


@pytest.fixture(scope="module")
def folder(trained, converted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    shutil.copytree(trained[0] / "work", folder / "work")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "records.jsonl").write_text('{"text": "Line 1: the cat"}\n{"text": "Line 2: the dog"}\n')
    shutil.copytree(converted[0], folder / "converted")
    shutil.copytree(converted[0].parent / "source", folder / "llama")
    (folder / "prompts.txt").write_text("Line 1\nLine 2: the cat\nthe\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "Line 1"}\n{"prompt": "the dog"}\n')
    solved, other = "1234341221434321", "1234341221434312"
    write_predictions(folder / "predictions.jsonl", [
        Prediction("0" * blanks + solved[blanks:], solved, answer, *setting, nfe=2)
        for blanks, answer in ((1, solved), (1, other), (4, solved))
        for setting in (("confidence", 2), ("confidence", 1))
    ])  # fmt: skip
    (folder / "bad.jsonl").write_text('{"text": 3}\n')
    (folder / "sudoku.py").write_text(SUDOKU)
    (folder / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
    return folder


def draw_run(kind, folder):
    """A small run of this kind that saved what it began with."""
    changes = [s.replace("@", f"{folder}/") for s in SMALLEST]
    drawn(override(load(f"configs/tinyshakespeare.py:{kind}"), changes), folder / kind)


@pytest.fixture
def seen():
    return set()


@pytest.fixture
def short(folder, monkeypatch):
    """What takes minutes is not begun, unless the list that this gives has something in it."""
    meant = []

    def unless_meant(work):
        def begun(*arguments, **named):
            if not meant:
                raise Reached
            return work(*arguments, **named)

        return begun

    for module, name in (
        ("diffusion_lm.training.loop", "run"), ("launch.compare", "_plan"), ("launch.compile", "examine"),
        ("launch.planning.scoreboard", "build"), ("launch.quickstart", "build"), ("lm_eval", "simple_evaluate"),
        ("launch.benchmark", "loading"), ("launch.benchmark", "open_weights"),
        ("launch.benchmarks.tradeoffs", "_by_steps"), ("launch.benchmarks.cache_drift", "held_out_prompts"),
    ):  # fmt: skip
        try:
            found = importlib.import_module(module)
        except ImportError:
            assert module == "lm_eval"
        else:
            monkeypatch.setattr(found, name, unless_meant(getattr(found, name)))
    monkeypatch.setattr(quickstart, "SUDOKU", folder / "sudoku.py")
    for suite in benchmark.SUITES:
        monkeypatch.setitem(benchmark.SUITES, suite, unless_meant(benchmark.SUITES[suite]))
    of = topologies.of
    one = topologies.Topology(devices=jax.devices(), memory=0)  # this process computes already
    monkeypatch.setattr(
        topologies, "of", lambda name, slices: one if (name, slices) == ("cpu:1", 1) else of(name, slices)
    )
    return meant


def write_log(*values):
    """What was run, for whoever looks for lines that are refused or take long: a file that COMMAND_LINES_LOG names."""
    if path := os.environ.get("COMMAND_LINES_LOG"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def strictly(text: str):
    """The JSON value; numbers that JSON doesn't have are refused."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def jsons(path) -> list:
    with open(path, encoding="utf-8") as file:
        return [strictly(line) for line in file.read().splitlines()]


def is_finite(value) -> bool:
    """Whether all numbers in it are."""
    if isinstance(value, dict | list):
        return all(map(is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def check_sample(values, result):
    most = values["max_new_tokens"]  # None: as many as the context holds, or the model's own sampler says
    asked = values["prompt"] or [""]
    if (values["out"] or "").endswith(".jsonl"):
        rows = jsons(values["out"])
        file = values["prompts_file"]
        if file:
            with open(file, encoding="utf-8") as lines:
                lines = lines.read().splitlines()
            asked = [json.loads(line)["prompt"] if file.endswith(".jsonl") else line for line in lines]
        asked = [prompt for prompt in asked for _ in range(values["num_samples"])]
        assert result["rows"] == result["new"] == len(rows) == len(asked)
        assert values["chat"] or [row["prompt"] for row in rows] == asked
        new = [row["completion"] for row in rows] if not values["chat"] else []
        assert result["nfe"] > 0 and result["tokens"] <= len(rows) * (most or result["tokens"])
        assert sum(not row["finished"] for row in rows) == result["unfinished"]
    else:
        rows = result["texts"]
        asked = values["infill"] or [prompt for prompt in asked for _ in range(values["num_samples"])]
        assert [row["prompt"] for row in rows] == asked
        new = [row["text"] for row in rows]
        assert most is None or values["infill"] or all(0 <= count <= most for count in result["tokens"])
        assert result["nfe"] > 0 and len(result["tokens"]) >= len(rows) and len(result["tokens"]) % len(rows) == 0
        scores = result.get("scores", [])
        assert is_finite(scores) and all(len(of) == values["best_of"] for of in scores if values["best_of"])
        assert all(0 < share <= 1 for share in result.get("shares", []))
        if values["ignore_eos"] and not values["infill"]:
            assert len(set(result["tokens"])) == 1 and result["tokens"][0] == (most or result["tokens"][0])
        if not values["infill"] and not values["best_of"] and len(result["tokens"]) == len(rows):
            assert values["workdir"].endswith("converted") or all(
                len(text) <= count for text, count in zip(new, result["tokens"], strict=True)
            )  # a token is a character
        for hole, text in zip(values["infill"], new, strict=False):
            first, *_, last = re.split(r"\[\[[-0-9]+\]\]", hole)
            assert text.startswith(first) and text.endswith(last) and len(text) >= len(first) + len(last)
        new = [] if values["infill"] else new
        if (values["view"] or "").endswith(".html"):
            with open(values["view"], encoding="utf-8") as page:
                assert page.read().rstrip().endswith("</html>")
    assert not any(mark in text for text in new for mark in ("░", "<mask>", "<s>", "</s>", "<pad>"))
    assert not any(stop in text for text in new for stop in values["stop"])
    assert not any(word in text for text in new for word in values["bad_words"])


def check_evaluate(values, result):
    parts = [part for part in result.values() if isinstance(part, dict)]
    assert parts and is_finite(parts) and result["tokens"] > 0 and result["bytes"] > 0
    assert all(part["nats_per_token"] > 0 and part["standard_error"] >= 0 for part in parts)
    assert "causal" not in result or result["causal"]["standard_error"] == 0
    if values["documents"]:
        rows = jsons(values["documents"])
        assert [row["document"] for row in rows] == list(range(len(rows))) and rows
        assert is_finite(rows) and all(row["tokens"] > 0 and row["log_likelihood"] < 0 for row in rows)
        for row in rows:
            each = row.get("token_log_likelihoods")
            assert row["exact"] == (each is not None)
            assert each is None or (len(each) == row["tokens"] and abs(sum(each) - row["log_likelihood"]) < 0.01)


def check_train(values, result):
    assert result["steps"] == 2 and not result["interrupted"] and is_finite(result)
    assert os.path.isdir(result["checkpoint"]) and result["loss"] > 0
    assert [row["step"] for row in jsons(f"{values['workdir']}/metrics.jsonl")][-1] == 2


def check_convert(values, result):
    folder = values["export"] or result["checkpoint"]
    assert os.path.isdir(folder) and result["parameters"] > 0 and result["model_type"] == "llama"
    again = load_source(folder) if values["export"] else load_for_inference(values["workdir"])
    leaves = jax.tree.leaves(again.network.params)
    assert sum(leaf.size for leaf in leaves) == result["parameters"]
    assert values["export"] or sum(leaf.nbytes for leaf in leaves) == result["bytes"]


def check_compile(values, result):
    size = result["bytes"]
    assert (
        result["chips"] == 1 and is_finite(result) and size["total"] >= size["parameters"] > 0 and result["flops"] > 0
    )
    assert not values["batch_size"] or result["batch_size"] == values["batch_size"]
    if values["out"]:
        with open(values["out"], encoding="utf-8") as file:
            assert strictly(file.read()) == result


def check_quickstart(values, result):
    assert result["steps"] == 2 and is_finite(result) and all(bits > 0 for bits in result["bits_per_byte"].values())
    assert os.path.getsize(result["page"]) and os.path.getsize(result["picture"])
    if values["boards"]:
        assert result["sudoku"]["boards"] == values["boards"] and os.path.getsize(result["sudoku"]["picture"])
        assert all(0 <= count <= values["boards"] for count in result["sudoku"]["solved"].values())


def check_scoreboard(values, result):
    assert result["rows"] and is_finite(result["rows"])


def check_rescore(values, result):
    settings = {2: 3, 1: 3}
    found = result.values() if values["by_difficulty"] else [result]
    for steps, total in settings.items():
        rows = [of["confidence"][str(steps)] for of in found]
        for name, count in (("exact", 2), ("verified", 2)):
            assert sum(row[name]["total"] for row in rows) == total
            assert sum(row[name]["count"] for row in rows) == count
            assert all(0 <= row[name]["low"] <= row[name]["high"] <= 1 for row in rows)


CHECKS = {"sample": check_sample, "evaluate": check_evaluate, "train": check_train, "convert": check_convert,
          "compile": check_compile, "quickstart": check_quickstart,
          "planning.scoreboard": check_scoreboard, "planning.rescore": check_rescore}  # fmt: skip


@settings(max_examples=NUMBER or 30, deadline=None, derandomize=not NUMBER, database=None,
          phases=[Phase.generate],  # a line that fails is short, and a shorter one takes seconds each time
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(line=lines())
def test_a_command_line_gives_its_result_or_one_line(folder, short, seen, capsys, monkeypatch, line):
    name, arguments, is_meant = line
    if (name, *arguments) in seen:  # Hypothesis likes to come back to what it knows
        return
    short[:] = [line] if is_meant else []
    for kind in DRAWN:
        if f"--workdir=@{kind}" in arguments and not (folder / kind).exists():
            draw_run(kind, folder)
    shutil.rmtree(folder / "new", ignore_errors=True)
    (folder / "new").mkdir()
    arguments = [argument.replace("@", f"{folder}/") for argument in arguments]
    launcher = importlib.import_module(f"launch.{name}")
    monkeypatch.setenv("HOME", str(folder))
    log = functools.partial(write_log, [name, is_meant, *line[1]])
    log("begun")
    began = time.monotonic()
    status, out, err = call(capsys, launcher, *arguments)
    said = f"launch.{name} {arguments}\nstatus {status}\n{out}\n{err}"
    reached = err.rstrip().endswith("Reached")
    ended = "accepted" if reached else ("result", "failed", "refused")[status]
    event(f"{name}: {ended}")
    log(ended, round(time.monotonic() - began, 1), *(err.splitlines()[-1:] if status else [out[-300:]]))
    if reached:
        return
    assert "Traceback" not in err, said
    if status:
        assert status in (1, 2) and not out and err.splitlines()[-1].startswith("error: "), said
        return
    try:
        result = strictly(out.splitlines()[-1])
        assert result, said
        values = {flag: launcher.FLAGS.values[flag].value for flag in launcher.FLAGS.values}
        CHECKS.get(name, lambda *_: None)(values, result)
        if (values.get("out") or "").endswith(".json") and name in ("sample", "harness"):
            with open(values["out"], encoding="utf-8") as file:
                assert strictly(file.read()) == result
    except AssertionError as error:
        raise AssertionError(said) from error
    seen.add((name, *line[1]))  # one that fails is run again
