"""launch.evaluate: the likelihood of held-out text."""

import json

import pytest
from support.commands import call

from launch import evaluate


def test_both_parts_of_a_joint_objective_are_reported_with_their_standard_error(trained, capsys, quick_compile):
    status, out, err = call(capsys, evaluate, f"--workdir={trained[0]}/work", "--noise_draws=3")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["causal"]["standard_error"] == 0 < result["canvas"]["standard_error"]
    nats = result["canvas"]["nats_per_token"]
    assert result["canvas"]["bits_per_byte"] == pytest.approx(nats * result["tokens"] / result["bytes"] / 0.6931472)
