"""The suite tradeoffs: its rows and charts, and what it computes from them."""

import jax
import numpy as np
import pytest

from diffusion_lm.inference import autotune
from launch.benchmarks import tradeoffs


@pytest.mark.cases(0)
def test_all_three_are_measured_and_plotted(trained, tmp_path, monkeypatch):
    for name, value in {"STEPS": (2,), "NUM_TEXTS": 4, "LENGTHS": (20,), "SCHEDULES": {}, "REPEATS": 1,
                        "SHORT_CANVASES": (4,)}.items():  # fmt: skip
        monkeypatch.setattr(tradeoffs, name, value)
    monkeypatch.setattr(autotune, "break_even", lambda *_: 2.0)
    work = f"{trained[0]}/work"
    rows = [row for part in tradeoffs.tradeoffs(work, None, [work], tmp_path / "charts") for row in part]
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {
        "quality.svg", "frontier.svg", "length.svg", "context.svg"
    }  # fmt: skip
    found = {row.name: row for row in rows}
    assert found["ancestral, 2 steps"].unit == "nats/token" and found["ancestral, 2 steps"].value > 0
    assert found[f"{work}, ancestral, 2 steps"].value == found["ancestral, 2 steps"].value
    assert found["ancestral, canvases of 4, 2 steps"].value > 0
    assert {f"{name}, 20 tokens" for name in ("autoregressive", "diffusion, 12 steps", "speculative", "auto")} <= set(
        found
    )
    assert all(row.value > 0 for row in rows)
    assert "100% of tokens equal" in found["speculative, lookup drafts, temperature 0, 20 tokens"].note


def test_two_lines_cross_where_they_are_equal():
    at = np.array([0.0, 2.0, 4.0, 5.0])
    assert tradeoffs._crossings(at, at, np.array([1.0, 1.0, 5.0, 5.5])) == pytest.approx([1.0, 3.0])
    assert tradeoffs._crossings(at, at, at + 1) == []


def test_flops_are_two_a_weight_and_four_a_key_and_channel(model):
    a, tokens = model.config.model, 5
    layers = jax.tree.leaves(model.network.params["layers"])
    weights = sum(leaf.size for leaf in layers if leaf.ndim > 2) + model.tokenizer.vocab * a.width
    attention = a.layers * 4 * a.width * 9
    assert tradeoffs._flops(model, tokens, 9) == tokens * (2 * weights + attention)
