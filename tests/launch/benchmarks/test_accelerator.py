"""The suite "accelerator", on a CPU at toy sizes: every leg gives rows, and none takes another along."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from support.commands import launch

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal, DraftAndVerify, Full
from diffusion_lm.config import load, override
from diffusion_lm.training import clock
from launch import docs
from launch.benchmarks import accelerator, accelerator_cases, accelerator_legs, accelerator_sampling
from launch.benchmarks.accelerator import SUITE, Leg
from launch.benchmarks.accelerator_cases import ACCELERATOR, TOY, Case, Measured

DRAFTS = (DraftAndVerify(4, 3), DraftAndVerify(4, 3, causal=True))
NOISY = (BlockDiffusionTraining(4, Causal()), BlockDiffusionTraining(4, BlockCausal(4)))


def test_every_leg_runs_to_the_end_at_toy_sizes(tmp_path):
    out = tmp_path / "rows.json"
    done = launch("benchmark", "--suite=accelerator", "--minutes=10", f"--out={out}", home=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(out.read_text()) and result["complete"]
    assert (result["platform"], result["sizes"], result["peak_flops"]) == ("cpu", "toy", None)
    assert result["versions"]["jax"] == jax.__version__ and result["date"]
    rows = {leg: [row for row in result["rows"] if row["leg"] == leg] for leg in SUITE}
    assert all(rows.values()), "every leg has rows"
    assert not [row for row in result["rows"] if row["skipped"] or row["value"] is None or row["passed"] is False]
    assert len(rows["smoke"]) == 7 and all(row["passed"] for row in rows["smoke"])
    assert all(row["ratio"] is None for row in result["rows"]), "the peak of a CPU isn't known"
    names = " ".join(row["name"] for row in result["rows"])
    for what in ("joint", "block", "token by token", "forked drafts", "int8", "in chunks", "full logits", "characters"):
        assert what in names
    counted = {row["name"]: row["note"] for row in rows["sample"]}
    made = accelerator_sampling.generations(TOY)
    for name in ("canvas", "token by token", "blocks", "canvas, int8"):
        planned = sum(passes.count for passes in made[name].passes)
        assert f" in {planned} passes" in counted[f"sample {name}, batch 1"], "the bound is of these passes"
    chunked, full = (row["gigabytes"] for row in rows["loss"])
    assert chunked < full


def test_a_leg_that_ends_early_has_a_row_that_says_why_and_the_next_one_goes_on(tmp_path, monkeypatch):
    """And this process asks for no device: it would take memory that the legs need."""
    out, shares = tmp_path / "rows.json", {"fails": 1.0, "killed": 1.0, "hangs": 0.02, "reads": 1.0}
    monkeypatch.setenv("SO_FAR", str(out))
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("asked for devices"))
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked for the platform"))
    legs = {name: Leg(share=share, target=f"support.legs:{name}") for name, share in shares.items()}
    result = accelerator.accelerator(2.0, out, legs)
    assert result == json.loads(out.read_text()) and result["complete"] and result["sizes"] == "toy"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    before, failed, kept, killed, stopped, read = result["rows"]
    assert before["value"] is None and before["skipped"] == "not finite: value nan"
    why = "the leg ended with status 1 after 'a row before it failed': ValueError: there is no such kernel"
    assert (failed["name"], failed["skipped"]) == ("fails", why)
    assert (kept["name"], kept["skipped"]) == ("toy", "") and 0 < kept["value"] < 120
    assert killed["skipped"].startswith("the leg ended by signal 9 after 'toy'")
    assert re.match(r"the leg was stopped at its limit of \d s before its first row", stopped["skipped"])
    assert read["name"] == "fails fails killed killed hangs" and read["passed"] is False, "the file grows leg by leg"


def test_a_file_that_cant_be_written_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        accelerator.accelerator(1.0, tmp_path, {"hangs": Leg(share=1.0, target="support.legs:hangs")})


def test_a_case_that_fails_is_a_row_and_all_are_compiled_before_one_is_timed():
    happened = []

    def prepare(what):
        happened.append("compiled")
        if what == "wrong":
            raise NotImplementedError("no kernel\nfor this")
        return what

    def finish(what):
        happened.append("timed")
        return Measured(name="", value=1.0)

    cases = [Case(name, lambda name=name: prepare(name), finish) for name in ("one", "wrong", "two")]
    rows = list(accelerator_cases.in_turn(cases))
    assert [row.name for row in rows] == ["one", "wrong", "two"] and rows[0].value == 1 and rows[2].compile_s >= 0
    assert rows[1].skipped == "NotImplementedError: no kernel for this" and rows[1].value is None
    assert happened == ["compiled"] * 3 + ["timed"] * 2


def test_the_bound_is_the_slower_of_products_and_memory(monkeypatch):
    assert accelerator_cases.least_seconds(1e12, 1e9) is None
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(clock.PEAK, kind, 1e12)
    monkeypatch.setitem(clock.BANDWIDTH, kind, 1e9)
    assert accelerator_cases.least_seconds(2e12, 1e9) == 2 and accelerator_cases.least_seconds(2e12, 3e9) == 3
    row = accelerator_cases.speed(4.0, 12, "tokens/s", least=2.0)
    assert (row.value, row.reference, row.ratio) == (3, 6, 0.5)


def test_a_generations_bound_adds_up_its_passes(monkeypatch):
    network = accelerator_sampling.abstract_network(TOY)
    made = accelerator_sampling.generations(TOY)
    monkeypatch.setattr(accelerator_sampling, "least_seconds", lambda operations, read: read)
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(network.params))
    weights -= network.params["embedding"].size * 2
    passes = {"canvas": 1 + TOY.steps, "token by token": TOY.new, "blocks": 1 + 4 * TOY.block_steps + 3}
    for name, count in passes.items():
        assert accelerator_sampling._least(network, made[name], 1) == count * weights


@pytest.mark.parametrize("pattern", [Causal(), Full(), BlockCausal(4), *NOISY, *DRAFTS], ids=str)
def test_the_exact_attention_sees_what_the_pattern_draws(pattern):
    length = 4 if isinstance(pattern, DraftAndVerify) else 8
    np.testing.assert_array_equal(accelerator_legs.attended(pattern, length, None)[0], docs.attended(pattern, length))


# ---- at the real sizes, abstractly: a GPU's minutes are too dear for a wrong shape ----

SHORT = dataclasses.replace(
    ACCELERATOR,
    network=dataclasses.replace(ACCELERATOR.network, layers=1),
    train=(*ACCELERATOR.train, "model.layers=1"),
)


@pytest.mark.parametrize("name", accelerator_sampling.generations(SHORT))
def test_generations_have_shapes_that_fit(name):
    network, what = accelerator_sampling.abstract_network(SHORT), accelerator_sampling.generations(SHORT)[name]
    assert accelerator_sampling.lowered_generation(network, what, max(SHORT.batches), SHORT.prompt)


def test_an_update_has_shapes_that_fit():
    program = accelerator_legs.update_program(accelerator_legs.update_config(SHORT, "joint", "chunked", "full"))
    state, metrics = jax.eval_shape(program.jitted, *program.arguments.values())
    assert metrics["loss"].shape == (1,) and jax.tree.structure(state) == jax.tree.structure(program.arguments["state"])


def test_the_real_network_is_one_of_8b():
    network = accelerator_sampling.abstract_network(ACCELERATOR)
    assert 8.1e9 < sum(a.size for a in jax.tree.leaves(network.params)) < 8.3e9


@pytest.mark.parametrize("pattern", [Causal(), BlockDiffusionTraining(16, Causal())], ids=str)
def test_the_smoke_test_asks_gpus_for_their_kernel(pattern, monkeypatch):
    """Lowered for Hopper, whose heads may be wider than 128 as those with documents are. (JAX asks for the version of a
    cuDNN that it would otherwise load, and for the device.)"""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", lambda _: True)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr("diffusion_lm.nn.cudnn.platform", lambda: "gpu")
    program = accelerator_legs.errors_program(pattern, 512 // len(pattern.kernels), 2, "cudnn", ACCELERATOR)
    text = program.trace(jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text


def test_the_short_run_is_a_config_that_exists():
    config = override(load("configs/text8.py:joint"), ACCELERATOR.learn)
    assert config.data.tokenizer_kind == "char"
