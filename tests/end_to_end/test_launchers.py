"""The commands a newcomer types, on a model small enough to train in seconds: results, and one line for bad input."""

import contextlib
import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from support.commands import launch

from diffusion_lm.inference import autotune, presets
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.samplers.drafters import TiDARDraft
from diffusion_lm.samplers.sampling_params import SamplingParams
from launch import profiler
from launch.benchmarks import tradeoffs


def test_training_ends_with_one_json_line_and_numbered_checkpoints(trained):
    folder, result = trained
    assert result["steps"] == 6 and result["loss"] > 0
    assert {p.name for p in (folder / "work/checkpoints").iterdir()} >= {"3", "6"}


def test_training_leaves_a_trace_and_its_programs_where_they_are_asked_for(trained):
    folder, _ = trained
    assert [path.name for path in (folder / "profile").glob("plugins/profile/*/*.xplane.pb")]
    assert list((folder / "programs").iterdir())


@pytest.mark.parametrize("calls", [2, 4, 9])
def test_a_trace_is_of_calls_3_to_5_or_of_those_that_there_are(calls, tmp_path, monkeypatch, caplog):
    heard, on = [], []

    @contextlib.contextmanager
    def trace(folder):
        assert folder == str(tmp_path / "new") and (tmp_path / "new").is_dir()
        on.append(True)
        yield
        on.pop()

    def work(number):
        heard.extend([number] * len(on))
        return number

    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(profiler, "PROFILE", types.SimpleNamespace(value=str(tmp_path / "new")))
    with profiler.some_calls(work) as worked:
        assert [worked(n) for n in range(1, calls + 1)] == list(range(1, calls + 1))
    assert heard == [n for n in range(1, calls + 1) if 3 <= n <= 5] and not on
    assert ("no trace" in caplog.text) == (calls < 3)


def test_a_trace_goes_into_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(profiler, "PROFILE", types.SimpleNamespace(value=str(tmp_path / "file")))
    with pytest.raises(NotADirectoryError, match="is no folder"), profiler.some_calls(print):
        pass


def test_evaluate_reports_both_readings_and_their_error(trained):
    folder, _ = trained
    done = launch("evaluate", f"--workdir={folder}/work", "--draws=3", home=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["causal"]["standard_error"] == 0 < result["canvas"]["standard_error"]
    nats = result["canvas"]["nats_per_token"]
    assert result["canvas"]["bits_per_byte"] == pytest.approx(nats * result["tokens"] / result["bytes"] / 0.6931472)


def test_sample_writes_text_its_file_and_a_page(trained):
    folder, _ = trained
    page, out = folder / "canvas.html", folder / "out.json"
    done = launch(
        "sample", f"--workdir={folder}/work", "--prompt=Line", "--prompt=", "--length=20", "--canvas=16", "--passes=4",
        f"--view={page}", f"--out={out}", f"--profile={folder}/traced", home=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert [t["prompt"] for t in result["texts"]] == ["Line", ""]
    assert result["nfe"] <= 1 + 2 * 4 + 1  # the prompt, two canvases, and the first one's commit
    assert "</html>" in page.read_text()
    assert list((folder / "traced").glob("plugins/profile/*/*.xplane.pb"))


def test_sample_fills_in_and_chooses(trained):
    """One command each: a hole of one length and of several, and the best of a few under rules."""
    folder, _ = trained
    plain = [f"--workdir={folder}/work", "--canvas=16", "--passes=2"]
    one = launch("sample", *plain, "--infill=Line [[2]]: the cat", "--infill=Line [[3]] the dog", home=folder)
    assert one.returncode == 0, one.stderr
    texts = [text["text"] for text in json.loads(one.stdout.splitlines()[-1])["texts"]]
    assert texts[0].startswith("Line ") and texts[0].endswith(": the cat") and texts[1].endswith(" the dog")
    several = launch("sample", *plain, "--infill=Line [[1-2]]: the cat", home=folder)
    assert len(json.loads(several.stdout.splitlines()[-1])["scores"][0]) == 2, several.stderr
    best = launch(
        "sample", *plain, "--prompt=Line", "--length=20", "--best_of=3", "--score=bound", "--guidance=1", "--ban=a",
        "--no_repeat=4", "--repetition=0.1", home=folder,
    )  # fmt: skip
    assert best.returncode == 0, best.stderr
    result = json.loads(best.stdout.splitlines()[-1])
    assert len(result["scores"][0]) == 3 and len(result["texts"]) == 1 and "a" not in result["texts"][0]["text"]


@pytest.mark.parametrize(
    ("name", "arguments", "cause"),
    [
        ("sample", ["--workdir=WORK", "--infill=no hole"], "has no hole"),
        ("sample", ["--workdir=WORK", "--infill=[[3]]", "--slide"], "--infill goes without"),
        ("sample", ["--workdir=WORK", "--cache=dual"], "exact cache"),
        ("sample", ["--workdir=WORK", "--sampler=renoise"], "masks only"),
        ("sample", ["--workdir=WORK", "--sampler=margin", "--particles=3"], "--particles is for"),
        ("sample", ["--workdir=nowhere"], "no checkpoint"),
        ("sample", ["--workdir=WORK", "--compile_cache=setup.py"], "File exists"),
        ("sample", ["--workdir=WORK", "--passes=0"], "passes must be at least 1"),
        ("sample", ["--workdir=WORK", "--view=canvas.pdf"], "--view takes"),
        ("evaluate", ["--workdir=WORK", "--data=missing.txt"], "missing.txt"),
        ("train", ["--config=configs/quickstart.py", "--workdir=WORK", "--set=optim.rate=1"], "optim.lr"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_workdir_alone(trained, name, arguments, cause):
    folder, _ = trained
    before = sorted(p for p in (folder / "work").rglob("*"))
    done = launch(name, *[a.replace("WORK", str(folder / "work")) for a in arguments], home=folder)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and cause in last and "Traceback" not in done.stderr
    assert sorted(p for p in (folder / "work").rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"canvas": 1000, "passes": 4}, "wider than the model's context"),
        ({"canvas": -1, "passes": 4}, "canvas must be at least 1"),
        ({"canvas": 16, "passes": 0}, "passes must be at least 1"),
        ({"canvas": 16, "passes": 10**9}, "passes must be at most"),
    ],
)
def test_absurd_canvases_are_refused(model, arguments, cause):
    with pytest.raises(ValueError, match=cause):
        presets.confidence(model, draw=SamplingParams(), **arguments)


def test_a_network_without_masks_does_not_draft_by_them(model):
    config = dataclasses.replace(model.config, objective=AutoregressiveLoss())
    with pytest.raises(ValueError, match="TiDARDraft guesses by canvases of masks"):
        presets.speculative(model._replace(config=config), draw=SamplingParams(), drafter=TiDARDraft())


@pytest.mark.parametrize(
    ("prompt", "length", "cause"), [("x" * 64, 1, "shorten the prompt"), ("x", 0, "length"), ("x", 63, "length")]
)
def test_what_the_context_cannot_hold_is_refused(model, prompt, length, cause):
    writer = presets.autoregressive(model, draw=SamplingParams())
    with pytest.raises(ValueError, match=cause):
        presets.write(model, writer, [prompt], length=length, seed=0)


def test_the_same_prompt_and_seed_give_the_same_text_in_any_batch(model):
    writer = presets.confidence(model, draw=SamplingParams(suppressed=model.tokenizer.suppressed), canvas=16, passes=4)
    alone = presets.write(model, writer, ["Line 1"], length=20, seed=7).texts
    together = presets.write(model, writer, ["Line 1", "Line 22: the"], length=20, seed=7).texts
    assert alone[0] == together[0]


def test_the_story_ends_in_the_text_that_is_returned(model):
    draw = SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))
    writer = presets.confidence(model, draw=draw, canvas=16, passes=4, record=True)
    answer = presets.write(model, writer, ["Line"], length=20, seed=1)
    last = presets.trace(model, answer, 0, length=20, title="t").frames[-1]
    prompt = len(answer.prompts[0])
    assert "".join(last.tokens[prompt : prompt + 20]) == "".join(
        model.tokenizer.pieces(answer.generation.tokens[0].tolist())
    )


def test_tradeoffs_measures_all_three_and_draws_them(trained, tmp_path, monkeypatch, quick_compile):
    for name, value in {"PASSES": (2,), "TEXTS": 4, "LENGTHS": (20,), "DIALS": {}, "REPEATS": 1}.items():
        monkeypatch.setattr(tradeoffs, name, value)
    monkeypatch.setattr(autotune, "break_even", lambda *_: 2.0)  # measuring is `test_the_other_writers_write`'s
    rows = tradeoffs.tradeoffs(f"{trained[0]}/work", None, tmp_path / "charts")
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {"quality.svg", "length.svg", "context.svg"}
    found = {row.name: row for row in rows}
    assert found["ancestral, 2 passes"].unit == "nats/token" and found["ancestral, 2 passes"].value > 0
    assert {f"{way}, 20 tokens" for way in ("autoregressive", "diffusion, 12 passes", "speculative", "auto")} <= set(
        found
    )
    assert all(row.value > 0 for row in rows)
    assert "100% of tokens the same" in found["speculative, lookup drafts, temperature 0, 20 tokens"].note


def test_two_lines_cross_where_they_are_level():
    at = np.array([0.0, 2.0, 4.0, 5.0])
    assert tradeoffs._crossings(at, at, np.array([1.0, 1.0, 5.0, 5.5])) == pytest.approx([1.0, 3.0])
    assert tradeoffs._crossings(at, at, at + 1) == []


def test_flops_are_two_a_weight_and_four_a_key(model):
    a, tokens = model.config.model.resolved, 5
    layers = jax.tree.leaves(model.bound.params["layers"])
    weights = sum(leaf.size for leaf in layers if leaf.ndim > 2) + model.tokenizer.vocab * a.width
    attention = a.layers * 4 * a.width * 9
    assert tradeoffs._flops(model, tokens, 9) == tokens * (2 * weights + attention)


@pytest.mark.parametrize("name", ["speculative", "auto"])
def test_the_other_writers_write(model, name):
    more = {"canvas": 0, "passes": 2} if name == "auto" else {}
    writer = getattr(presets, name)(model, draw=SamplingParams(suppressed=model.tokenizer.suppressed), **more)
    answer = presets.write(model, writer, ["Line 1"], length=20, seed=7)
    assert answer.generation.length[0] <= 20 and answer.generation.nfe >= 2
    if name == "speculative":
        plain = presets.autoregressive(model, draw=SamplingParams(suppressed=model.tokenizer.suppressed))
        assert answer.texts == presets.write(model, plain, ["Line 1"], length=20, seed=7).texts
