"""The suites of other people's weights, on tiny ones: each peer answers, and what was written is read."""

import pytest

from launch.benchmarks import loading, open_weights

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
TINY = loading.CONFIG | SIZES | {"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def one_round_of_tiny_models(monkeypatch):
    pytest.importorskip("tokenizers", reason="the tokenizers package is not installed: pip install -e '.[test]'")
    monkeypatch.setattr(loading, "CONFIG", TINY)
    for module in (loading, open_weights):
        monkeypatch.setattr(module, "REPEATS", 1)


def test_a_librarys_process_answers_for_each_case(tmp_path):
    loading.write_synthetic(tmp_path / "model", TINY)
    found = open_weights.take_turns({"ours float32": str(tmp_path / "model")})
    assert found.keys() == {"ours float32"} and found["ours float32"].keys() == open_weights.CASES.keys()
    assert all(timing.wall > 0 for timing in found["ours float32"].values())


def test_a_peer_that_ends_is_named(capfd):
    with pytest.raises(ValueError, match="the process of ours float32 ended with status 1"):
        open_weights.take_turns({"ours float32": "no such folder"})
    assert "no such folder is not a folder" in capfd.readouterr().err


def test_a_synthetic_checkpoint_is_loaded_onto_one_device_and_shared_out_over_eight():
    rows = loading.loading(layers=2)
    assert [row.unit for row in rows] == ["GB/s", "GB", "GB/s", "GB"] and all(row.value > 0 for row in rows)
