"""The suites of other people's weights, on tiny ones: each peer answers, and what was written is read."""

import pytest

from launch.benchmarks import loading, open_weights, turns

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
TINY = loading.CONFIG | SIZES | {"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def one_round_of_tiny_models(monkeypatch):
    pytest.importorskip("tokenizers", reason="the tokenizers package is not installed: pip install -e '.[test]'")
    monkeypatch.setattr(loading, "CONFIG", TINY)
    monkeypatch.setattr(loading, "REPEATS", 1)


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", open_weights.OURS)
def test_our_process_answers_for_each_case(kind, tmp_path):
    loading.write_synthetic(tmp_path / "model", TINY)
    found = turns.take_turns({"ours": open_weights._peer("_ours", kind, str(tmp_path / "model"))}, repeats=1)
    assert found.absent == {} and found.timings.keys() == {("ours", case) for case in open_weights.CASES}


def test_transformers_process_answers_for_each_case(tmp_path):
    pytest.importorskip("transformers", reason="the extra [bench] is not installed")
    loading.write_synthetic(tmp_path / "model", TINY)
    peer = open_weights._peer("_transformers", "bfloat16", str(tmp_path / "model"))
    found = turns.take_turns({"transformers": peer}, repeats=1)
    assert found.absent == {} and found.timings.keys() == {("transformers", case) for case in open_weights.CASES}


def test_a_model_that_is_not_there_is_the_reason(capfd):
    found = turns.take_turns({"ours": open_weights._peer("_ours", "float32", "no such folder")}, repeats=1)
    assert "no such folder is not a folder" in found.absent["ours"] and not found.timings
    assert "no such folder is not a folder" in capfd.readouterr().err


def test_a_synthetic_checkpoint_is_loaded_onto_one_device_and_shared_out_over_eight():
    rows = loading.loading(layers=2)
    assert [row.unit for row in rows] == ["GB/s", "GB", "GB/s", "GB"] and all(row.value > 0 for row in rows)
