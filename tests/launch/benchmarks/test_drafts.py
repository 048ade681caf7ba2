"""The benchmark of trained drafts, on a tiny converted model with adapters."""

import jax
import jax.numpy as jnp
import pytest
from support import commands
from support.begun import config_of, trained

from diffusion_lm.config import override
from diffusion_lm.inference import autotune
from diffusion_lm.nn.lora import LoRA
from diffusion_lm.objectives.drafting import Drafting
from launch.benchmarks import drafts

SMALL = (
    "--prefix=10",
    "--prefixes=6",
    "--counted=2",
    "--written=1",
    "--max_new_tokens=9",
    "--seeds=2",
    "--temperature=0.7",
)


def test_drafts_that_are_always_right(converted, lines, tmp_path, capsys, monkeypatch):
    """A network that says the same everywhere: each mask is right, each cycle accepts all of them, and
    each sampler writes the same text."""
    config = config_of(lines, Drafting(draft_length=3, num_anchors=4), trainable=LoRA(rank=2), init=str(converted[0]))
    model = trained(override(config, ["exec.compute_dtype=float32", "data.seq_len=64"]), tmp_path)
    zeros = jax.tree.map(jnp.zeros_like, model.network.params)
    model = model._replace(network=model.network.replace(params=zeros), prepared={})
    monkeypatch.setattr(drafts, "load_for_inference", lambda workdir: model)
    monkeypatch.setattr(drafts, "QUESTIONS", ("the cat", "a mat"))
    monkeypatch.setattr(autotune, "break_even", lambda *_: 1.0)
    found = commands.result(capsys, drafts, f"--workdir={tmp_path}", f"--data={lines}", *SMALL)
    assert found["right_by_position"] == [1.0, 1.0, 1.0] and found["positions_compared"] == 6
    samplers = {"autoregressive", "trained", "lookup", "always"}
    assert found["chat"].keys() == found["prefixes"].keys() == samplers | {"accepted"}
    for name in samplers:
        assert found["prefixes"][name]["same_text"] == 1 and found["prefixes"][name]["tokens_per_s"] > 0
    # Of 9 tokens the prompt gives one, a cycle 5, and plain steps the rest.
    assert found["prefixes"]["accepted"] == {
        "mean": pytest.approx(8 / 2 - 2),
        "stderr": 0.0,
        "cycles": 2 * 2 * 2,
        "texts": 2 * 2,
    }


def test_a_network_that_does_not_draft_is_one_line(converted, lines, capsys):
    code, _, err = commands.call(capsys, drafts, f"--workdir={converted[0]}", f"--data={lines}", *SMALL)
    assert code == 2 and "was not trained to draft" in err.splitlines()[-1]
