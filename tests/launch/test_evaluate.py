"""launch.evaluate: the likelihood of held-out text."""

import json

import pytest
from support.commands import call

from launch import evaluate


def test_both_parts_of_a_joint_objective_are_reported_with_their_standard_error(trained, capsys):
    status, out, err = call(capsys, evaluate, f"--workdir={trained[0]}/work", "--noise_draws=3")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["causal"]["standard_error"] == 0 < result["canvas"]["standard_error"]
    nats = result["canvas"]["nats_per_token"]
    assert result["canvas"]["bits_per_byte"] == pytest.approx(nats * result["tokens"] / result["bytes"] / 0.6931472)


def test_each_document_has_a_line_and_their_sum_is_the_whole(trained, tmp_path, capsys):
    data, out = tmp_path / "some.txt", tmp_path / "out.jsonl"
    data.write_text("Line 1: the cat sat.\n\nLine 2: the dog sat on the mat.\n\n")
    flags = f"--workdir={trained[0]}/work", f"--data={data}", "--seq_len=32"
    status, printed, err = call(capsys, evaluate, *flags, f"--documents={out}")
    assert status == 0, err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["document"] for line in lines] == [0, 1] and all(line["exact"] for line in lines)
    whole = json.loads(printed.splitlines()[-1])
    assert sum(line["tokens"] for line in lines) == whole["tokens"]
    assert lines[0]["log_likelihood"] == pytest.approx(-lines[0]["nats_per_token"] * lines[0]["tokens"])
    for line in lines:
        assert len(line["token_log_likelihoods"]) == line["tokens"]
        assert sum(line["token_log_likelihoods"]) == pytest.approx(line["log_likelihood"], abs=1e-4)
    assert sum(line["log_likelihood"] for line in lines) == pytest.approx(
        -whole["causal"]["nats_per_token"] * whole["tokens"], rel=0.05
    )  # rows there hold several documents, so that a cut falls elsewhere


def test_documents_need_data(trained, capsys):
    status, _, err = call(capsys, evaluate, f"--workdir={trained[0]}/work", "--documents=x.jsonl")
    assert status == 2 and "--documents goes with --data" in err
