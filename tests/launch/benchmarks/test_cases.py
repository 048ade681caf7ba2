"""What the benchmark counts, compares and compiles; no test depends on how long anything takes."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.commands import call

from diffusion_lm.attention_patterns import Causal, Full
from diffusion_lm.config import load, override
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.objectives.learned_noise import LearnedNoise
from diffusion_lm.processes.state_dependent import LearnedMasking
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from launch import benchmark
from launch.benchmarks import data_loading, jax_cases, timing, torch_cases, turns
from launch.benchmarks.timing import Row, Timing

SIZES = jax_cases.Sizes(vocab=11, width=16, layers=1, heads=2, mlp=24)
SPECIAL = {"mask": 11, "eos": 12}


def timed(*walls):
    return Timing(walls=walls, cpus=walls)


def test_cases_alternate_in_changing_order_after_one_untimed_call_each():
    order = []
    timings = timing.alternate({name: lambda name=name: order.append(name) for name in "ABC"}, repeats=5)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds[0] == "ABC" and all(sorted(r) == list("ABC") for r in rounds) and len(set(rounds)) > 2
    assert all(len(t.walls) == len(t.cpus) == 5 for t in timings.values())


def test_no_repeats_are_an_error():
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        timing.alternate({"A": lambda: None}, repeats=0)


def test_updates_follow_one_another_on_new_batches():
    made = []

    def step(state, key, batch, constants):
        made.append((int(state), np.asarray(batch).tolist()))
        return state + 1, {}

    batches = (np.array([n]) for n in range(10**9))
    job = SimpleNamespace(
        initial=lambda: np.int32(0), key=None, batches=batches, constants={}, put=lambda batch: batch, step=step
    )
    first, each = timing.updates(job, seconds=0.0)
    assert made == [(0, [[0]]), (1, [[1]])] and first > 0 < each
    timing.updates(job, seconds=0.01)
    assert len(made) > 4


def test_a_ratio_is_taken_within_a_round():
    """A noisy round slows both cases: it moves the ratio of medians, not the median of ratios."""
    ours, theirs = timed(1.0, 1.0, 10.0), timed(3.0, 30.0, 30.0)
    assert timing.times_faster(ours, theirs) == 3
    assert theirs.wall / ours.wall == 30
    assert (ours.best, theirs.best) == (1, 3)


def test_a_row_is_compared_in_its_own_unit():
    ours, theirs = timed(1.0, 2.0, 4.0), timed(4.0, 6.0, 4.0)
    alone = Row(name="a", value=12 / ours.wall, unit="tokens/s", target="more")
    row = timing.compared(alone, ours, theirs, 12)
    assert (row.value, row.reference, row.ratio, row.best_ratio) == (6, 3, 3, 4)
    assert (row.name, row.unit, row.target, row.reference_cpu_s) == ("a", "tokens/s", "more", None)
    assert timing.compared(dataclasses.replace(alone, cpu_s=2.0), ours, theirs, 12).reference_cpu_s == theirs.cpu


def test_rounds_that_do_not_match_are_an_error():
    with pytest.raises(ValueError):
        timing.times_faster(timed(1.0), timed(1.0, 2.0))


def test_a_table_shows_values_and_why_a_value_is_missing():
    rows = [Row(name="a", value=1234.5, unit="tokens/s", ratio=2.0), Row(name="bb", skipped="torch not installed")]
    head, first, second = timing.table(rows).splitlines()
    assert first.startswith("a ") and "1,234 " in first and "tokens/s" in first
    assert second.startswith("bb") and second.endswith("skipped: torch not installed")
    assert head.index("unit") == first.index("tokens/s")


def test_provenance_says_where_with_what_and_when():
    found = json.loads(json.dumps(timing.provenance()))
    assert "cores" in found["hardware"] and found["versions"]["jax"] == jax.__version__ and found["date"][:2] == "20"


@pytest.mark.parametrize(
    ("objective", "process"),
    [(AutoregressiveLoss(), None), (Joint(block_size=4), None), (LearnedNoise(), LearnedMasking())],
    ids=["autoregressive", "joint", "learned"],
)
def test_a_train_step_updates_again_and_again(objective, process):
    """Also at the default precision, and in rows shorter than one chunk of attention."""
    step = jax_cases.TrainStep(SIZES, objective, process, batch=2, length=8)
    first, second = step(), step()
    assert first["targets"] == 2 * 7 and first["finite"] == second["finite"] == 1
    assert first["lr"] < second["lr"] and first["loss"] != second["loss"]


@pytest.mark.parametrize(
    ("sampler", "nfe"),
    [
        (AutoregressiveSampler(**SPECIAL), 6),
        (
            BlockDiffusion(sampler=Confidence(denoising_steps=2, eos=SPECIAL["eos"]), canvas_length=4, **SPECIAL),
            1 + 2 + 1 + 2,
        ),  # prompt, canvas, commit
    ],
    ids=["autoregressive", "canvases"],
)
def test_a_generation_has_all_new_tokens_each_time(sampler, nfe):
    generate = jax_cases.generation(jax_cases.random_network(SIZES).for_sampling(rows=1), sampler, prompt=3, new=6)
    one, two = generate(), generate()
    assert int(one.length[0]) == 6 and int(one.nfe) == nfe
    np.testing.assert_array_equal(one.tokens, two.tokens)


def test_data_loading_is_compared_with_one_batch():
    tiny = (
        "model.width=16",
        "model.layers=1",
        "model.heads=2",
        "model.mlp_dim=16",
        "train.batch_size=2",
        "data.valid=2",
    )
    row = data_loading.loading("path", override(load("configs/planning/m1.py:path-ar"), tiny), generated=20, repeats=2)
    assert (
        row.name == "data loading, path, batch 2" and row.value > 0 < row.reference and row.ratio > 0 < row.best_ratio
    )
    assert "one core generates" in row.note


def test_the_loss_needs_no_memory_for_all_logits():
    vocab, positions = 4096, 2048
    found = jax_cases.loss_memory(vocab=vocab, positions=positions, width=8)
    assert found.chunked < 4 * vocab * positions < found.full
    assert jax_cases.loss_memory(vocab=vocab, positions=2 * positions, width=8).chunked < 1.1 * found.chunked


def test_the_launcher_prints_rows_and_writes_them(tmp_path, capsys):
    status, out, err = call(capsys, benchmark, "--suite=memory", f"--out={tmp_path / 'rows.json'}")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "rows.json").read_text())
    (row,) = result["rows"]
    assert row["name"] == "loss temporaries" and row["value"] <= 1.6 and row["note"].endswith("compiled only")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--suite=train", "--out=nowhere/rows.json"], "its folder doesn't exist"),
        (["--suite=tradeoffs"], "--workdir goes with"),
        (["--suite=train", "--workdir=x"], "--workdir goes with"),
        (["--suite=train", "--minutes=2"], "--minutes goes with"),
        (["--suite=train", "--beside=x"], "--judge and --beside go with"),
        (["--suite=engine"], "--suite=engine"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(arguments, cause, capsys):
    status, out, err = call(capsys, benchmark, *arguments)
    assert (status, out) == (2, "") and err.count("\n") == 1 and cause in err


@pytest.mark.parametrize("suite", ["tradeoffs", "cache_drift"])
def test_a_chart_without_matplotlib_is_refused_before_anything_is_measured(suite, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, out, err = call(capsys, benchmark, f"--suite={suite}", "--workdir=nowhere")
    assert (status, out) == (2, "") and "a chart needs matplotlib: pip install 'diffusion_lm[viz]'" in err


@pytest.mark.parametrize("attention", [Causal(), Full()])
def test_pytorchs_network_has_the_same_logits(attention):
    """With the same weights."""
    torch = pytest.importorskip("torch", reason="the extra [bench] is not installed")
    module = torch_cases.language_model(**dataclasses.asdict(SIZES), causal=isinstance(attention, Causal))
    denoiser = SIZES.transformer(tied=False)
    denoiser = denoiser.clone(exec=dataclasses.replace(denoiser.exec, compute_dtype="float32"))
    tokens = np.random.default_rng(0).integers(11, size=(2, 7)).astype("i4")
    bound = BoundModel(module=denoiser, params=_params_of(module))
    at, one = np.broadcast_to(np.arange(7, dtype="i4"), (2, 7)), np.ones((2, 7), "i4")
    said = jax.jit(
        lambda b: b.denoise(tokens, np.zeros((2, 1), "f4"), attention=attention, positions=at, segment_ids=one).logits()
    )(bound)
    with torch.inference_mode():
        expected = module(torch.from_numpy(tokens.astype("i8"))).numpy()
        last = module(torch.from_numpy(tokens.astype("i8")), 3).numpy()
    np.testing.assert_allclose(said, expected, atol=2e-5)
    np.testing.assert_allclose(last, expected[:, -3:], atol=2e-6)


def _params_of(module) -> dict:
    """A torch network's weights in the denoiser's names and shapes, with padding rows of zeros."""
    e, h, d = SIZES.width, SIZES.heads, SIZES.width // SIZES.heads

    def rows(table):
        return np.pad(table.detach().numpy(), [(0, 128 - len(table)), (0, 0)])

    def scale(norm):
        return {"scale": norm.weight.detach().numpy()}

    def layer(one):
        qkv, up = one.qkv.weight.detach().numpy().T, one.gate_up.weight.detach().numpy().T
        attention = {
            "query": qkv[:, :e].reshape(e, h, d),
            "key_value": qkv[:, e:].reshape(e, 2, h, d),
            "output": one.output.weight.detach().numpy().T.reshape(h, d, e),
        }
        mlp = {"gate_up": up.reshape(e, 2, SIZES.mlp), "down": one.down.weight.detach().numpy().T}
        norms = {"attention_norm": scale(one.attention_norm), "mlp_norm": scale(one.mlp_norm)}
        return {"attention": attention, "mlp": mlp, **norms}

    return {
        "embedding": rows(module.embedding.weight),
        "unembedding": rows(module.unembedding.weight),
        "embedding_norm": scale(module.embedding_norm),
        "final_norm": scale(module.final_norm),
        "layers": jax.tree.map(lambda *a: np.stack(a), *map(layer, module.layers)),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_trains_and_transformers_generates(dtype):
    pytest.importorskip("transformers", reason="the extra [bench] is not installed")
    step = torch_cases.train_step(batch=2, length=8, dtype=dtype, **dataclasses.asdict(SIZES))
    assert step() is None
    generate = torch_cases.decode(prompt=3, new=6, dtype=dtype, **dataclasses.asdict(SIZES))
    assert len(generate()) == 6 and generate() == generate()


def test_pytorch_clears_canvases_without_a_cache():
    pytest.importorskip("torch", reason="the extra [bench] is not installed")
    again = torch_cases.recomputed(prompt=3, new=8, canvas=4, passes=3, **dataclasses.asdict(SIZES))()
    assert len(again) == 8 and max(again) < SIZES.vocab  # no mask is left


def test_every_form_of_pytorch_takes_its_turn_or_says_why_not():
    pytest.importorskip("torch", reason="the extra [bench] is not installed")
    peers = torch_cases.training_peers(batch=2, length=8, **dataclasses.asdict(SIZES))
    found = turns.take_turns(peers, repeats=1)
    assert len(peers) == 4 and {peer for peer, _ in found.timings} | set(found.absent) == set(peers)
    assert {"PyTorch float32", "PyTorch bfloat16"}.isdisjoint(found.absent)  # compiled ones need a C++ compiler


@pytest.mark.cases(1)
@pytest.mark.parametrize("suite", ["train", "decode", "canvas"])
def test_rows_without_peers_have_our_value_and_the_reason(suite, monkeypatch):
    monkeypatch.setattr(turns, "missing", lambda *packages: "not installed" if packages else "")
    for name, value in {"TRAIN": SIZES, "DECODE": SIZES, "SPECIAL": SPECIAL, "ROWS": 2, "LENGTH": 32}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "FLOORS", {32: 70})
    monkeypatch.setattr(benchmark, "NEW", 32)
    rows = benchmark.SUITES[suite]()
    assert rows and all(row.value > 0 for row in rows)
    beside = [row for row in rows if row.skipped]
    assert beside and all("not installed" in row.skipped and row.reference is None for row in beside)
