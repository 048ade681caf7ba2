"""Random command lines over all launchers: a result that holds what was asked, or one line that says why there is none.

COMMAND_LINES=400 python -m pytest -n 0 --hypothesis-show-statistics tests/launch/test_command_lines.py

makes as many, and each time others.
"""

import importlib
import json
import math
import os
import shutil

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.commands import SMALL, TEXT, call

from launch import benchmark

NUMBER = int(os.environ.get("COMMAND_LINES", 0))
LAUNCHERS = ("sample", "evaluate", "train", "convert", "compare", "compile", "benchmark", "quickstart", "harness",
             "planning.scoreboard", "planning.rescore")  # fmt: skip
WEIGHTS = ("sample",) * 8 + ("evaluate",) * 2 + ("train",) * 3 + LAUNCHERS
# Not drawn: they would wait for other processes, or keep settings of this one.
LEFT_OUT = {"help", "distributed", "num_processes", "process_id", "host_timeout", "compile_cache", "profile", "charts"}
INTEGERS = ["0", "1", "2", "3", "4", "7", "16", "17", "33", "-1", "100", "2147483648", "1.5", "x", "", "nan"]
FLOATS = ["0", "0.1", "0.5", "0.9", "1", "1.5", "3", "-1", "1e9", "nan", "inf", "1e400", "x", ""]
SMALL_INTEGERS = ["0", "1", "2", "3", "-1", "x"]  # where more would take long
TEXTS = ["Line 3: the cat", "Line ", "", " ", "\n", "▁", "a" * 70, "<s>", "caf\udce9", "Ж", "[[3]]", "Line [[2-3]] the"]
PATHS = {
    "workdir": ["work", "work", "work", "none", "text.txt", "", "empty", "folder/x"],
    "source": ["work", "none", "text.txt", "empty", "package:none", "package:json", "", "bad.gguf"],
    "export": ["new", "work", "text.txt", "none/x/y", ""],
    "data": ["text.txt", "none.txt", "empty", "records.jsonl", "bad.jsonl", "*.txt", "", "python-none"],
    "out": ["out.json", "none/out.json", "empty", "", "text.txt/out.json"],
    "documents": ["out.jsonl", "none/out.jsonl", "empty", ""],
    "view": ["page.html", "none/page.html", "page.png", "", "terminal"],
    "config": ["configs/quickstart.py", "configs/quickstart.py:x", "configs/tinyshakespeare.py:masked", "none.py",
               "text.txt", "", "configs/tinyshakespeare.py:none"],
    "include_path": ["empty", "none", ""],
    "request_cache": ["cache.jsonl", "text.txt", "none/c.jsonl"],
    "predictions": ["text.txt", "none", "empty"],
    "judge": ["work", "none"],
    "tests": ["text.txt", "none", "sudoku4=none"],
}  # fmt: skip
CHOICES = {
    "set": ["train.steps=2", "train.steps=0", "train.steps=x", "model.width=33", "model.widht=3", "model", "=",
            "data.path=none.txt", "optim.lr=nan", "optim.lr=1e3", "objective.block_size=7", "exec.compute_dtype=int8",
            "exec.attention_kernel=splash", "train.batch_size=0", "train.grad_accum_steps=3", "checkpoint.save_every=0",
            "data.tokenizer=none.model", "mesh.data=3", "seed=-1", "train.ema_decay=2", "data.val_fraction=1"],
    "sampler": ["confidence", "threshold", "factor", "entropy_bound", "ancestral", "remask_cap", "remask_rescale",
                "remask_confidence", "remask_loop", "renoise", "embedding_flow", "autoregressive", "speculative",
                "confidnce", "", "os:path", "none:None", ":"],
    "kinds": ["ar", "masked", "ar,none", "", "ar:x", "sudoku4"],
    "tasks": ["none", "", "sudoku4", "sudoku4,x"],
    "topology": ["cpu:1", "cpu:0", "x", "v5e:0x4", "cpu:", ""],
    "allow_import": ["support", "none", "", "os"],
    "experiment": ["sudoku4-ar", "x", ""],
    "denoising_steps": ["1", "2", "3", "100001", "0", "-1", "x", "1,2"],
    "suite": ["none", ""],
    "coordinator": ["localhost:1", ""],
    "stop": ["a", "", "\n", "caf\udce9"],
    "bad_words": ["a", "", "e", "caf\udce9"],
}  # fmt: skip
FEW = {"max_new_tokens", "num_samples", "best_of", "num_particles", "noise_draws", "revise_rounds", "canvas_length"}
FEW_OF = {"max_new_tokens": ["1", "4", "17", "33", "63", "64", "0", "x"], "canvas_length": ["0", "1", "3", "16", "50",
          "65", "-1"]}  # fmt: skip


class Reached(Exception):
    """The launcher has accepted its command line and would now work for long."""


@st.composite
def lines(draw):
    """(launcher, arguments), with paths that begin with '@' where the test's folder belongs."""
    name = draw(st.sampled_from(WEIGHTS))
    flags = importlib.import_module(f"launch.{name}").FLAGS
    required = sorted(flags._required)
    names = [n for n in required if draw(st.integers(0, 9))]
    optional = sorted(set(flags.values) - LEFT_OUT - set(required))
    names += draw(st.lists(st.sampled_from(optional), max_size=4 if NUMBER else 2))
    arguments = [draw(argument(flags.values[n], own=n in required)) for n in names]
    if name == "benchmark":
        arguments = ["--charts=@charts", *arguments]
    if name in ("train", "quickstart", "compile") and draw(st.integers(0, 9)):
        arguments = [*(f"--set={s}" for s in (*SMALL, "data.path=@text.txt", "train.steps=2")), *arguments]
    return name, [*arguments, *draw(st.sampled_from([[]] * 9 + [["stray"], ["--none=1"], ["--workdir"]]))]


@st.composite
def argument(draw, flag, own):
    name, kind = flag.name, flag.flag_type()
    if name in PATHS:
        path = draw(st.sampled_from(PATHS[name][:1] * (16 if own else 4) + PATHS[name]))
        whole = name != "config" and path and not path.startswith(("package:", "python-", "terminal"))
        return f"--{name}={'@' if whole else ''}{path}"
    if name in CHOICES:
        return f"--{name}={draw(st.sampled_from(CHOICES[name]))}"
    if kind == "bool":
        return draw(st.sampled_from([f"--{name}", f"--no{name}", f"--{name}=x", f"--{name}=true"]))
    if kind == "int":
        few = FEW_OF.get(name, SMALL_INTEGERS if name in FEW else INTEGERS)
        return f"--{name}={draw(st.sampled_from(few))}"
    if kind == "float":
        return f"--{name}={draw(st.sampled_from(FLOATS))}"
    if kind == "string enum" or hasattr(flag.parser, "enum_values"):
        return f"--{name}={draw(st.sampled_from([*flag.parser.enum_values, 'none', '']))}"
    return f"--{name}={draw(st.sampled_from(TEXTS))}"


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory, quick_compile):
    folder = tmp_path_factory.mktemp("lines")
    shutil.copytree(trained[0] / "work", folder / "work")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "records.jsonl").write_text('{"text": "Line 1: the cat"}\n{"text": "Line 2: the dog"}\n')
    (folder / "bad.jsonl").write_text('{"text": 3}\n')
    (folder / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
    return folder


@pytest.fixture
def short(monkeypatch):
    """What takes minutes is not begun."""

    def reached(*_, **__):
        raise Reached

    for module, name in (
        ("diffusion_lm.training.loop", "run"), ("launch.compare", "_plan"), ("launch.compile", "examine"),
        ("launch.planning.scoreboard", "build"), ("launch.quickstart", "build"), ("lm_eval", "simple_evaluate"),
        ("launch.benchmark", "loading"), ("launch.benchmark", "open_weights"),
        ("launch.benchmarks.tradeoffs", "_by_steps"), ("launch.benchmarks.cache_drift", "held_out_prompts"),
    ):  # fmt: skip
        try:
            monkeypatch.setattr(importlib.import_module(module), name, reached)
        except ImportError:
            assert module == "lm_eval"
    for suite in benchmark.SUITES:
        monkeypatch.setitem(benchmark.SUITES, suite, reached)


def strictly(text: str):
    """The JSON value; numbers that JSON doesn't have are refused."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check_sample(values, result):
    rows = result["texts"]
    assert len(rows) == len(values["infill"] or values["prompt"] or [""]) * values["num_samples"]
    most = values["max_new_tokens"]  # None: as many as the context holds, or the model's own sampler says
    assert most is None or values["infill"] or all(count <= most for count in result["tokens"])
    assert all("░" not in row["text"] for row in rows) and result["nfe"] > 0
    assert not any(stop in row["text"] for row in rows for stop in values["stop"])
    new = [row["text"] for row in rows] if not values["infill"] else []
    assert not any(word in text for text in new for word in values["bad_words"])
    if values["ignore_eos"] and not values["infill"]:
        assert len(set(result["tokens"])) == 1 and result["tokens"][0] == (most or result["tokens"][0])


def check_evaluate(values, result):
    parts = [result[part] for part in ("causal", "canvas")]
    assert all(math.isfinite(n) for part in parts for n in part.values()) and result["tokens"] > 0
    assert all(part["nats_per_token"] > 0 for part in parts)


CHECKS = {"sample": check_sample, "evaluate": check_evaluate}


@settings(max_examples=NUMBER or 40, deadline=None, derandomize=not NUMBER, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(line=lines())
def test_a_command_line_gives_its_result_or_one_line(folder, short, capsys, monkeypatch, line):
    name, arguments = line
    arguments = [argument.replace("@", f"{folder}/") for argument in arguments]
    launcher = importlib.import_module(f"launch.{name}")
    monkeypatch.setenv("HOME", str(folder))
    status, out, err = call(capsys, launcher, *arguments)
    said = f"launch.{name} {arguments}\nstatus {status}\n{out}\n{err}"
    reached = err.rstrip().endswith("Reached")
    event(f"{name}: {'accepted' if reached else ('result', 'failed', 'refused')[status]}")
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
        if values.get("out") and name in ("sample", "harness"):
            with open(values["out"], encoding="utf-8") as file:
                assert strictly(file.read()) == result
    except AssertionError as error:
        raise AssertionError(said) from error
