"""Shares and their intervals; predictions that are written, read and counted again."""

import json

import numpy as np
import pytest

from diffusion_lm.planning.results import (
    TOKENS,
    Prediction,
    accuracy,
    by_way,
    read_predictions,
    wilson,
    write_predictions,
)
from diffusion_lm.planning.tasks.countdown import Countdown

TASK = Countdown(numbers=3)
PREDICTIONS = [
    Prediction("3,5,2,16", "3+5=8,2*8=16", "3+5=8,2*8=16", "random", 4, 5),
    Prediction("3,5,2,16", "3+5=8,2*8=16", "5+3=8,8*2=16", "random", 4, 5),
    Prediction("3,5,2,16", "3+5=8,2*8=16", "3+5=9,2*8=16", "random", 4, 5),
    Prediction("3,5,2,16", "3+5=8,2*8=16", "", "random", 1, 2),
    Prediction("3,5,2,16", "3+5=8,2*8=16", "3+5=8,2*8=16", "entropy", 4, 5),
]


def test_another_right_answer_counts_as_right_and_not_as_exact():
    found = by_way(TASK, PREDICTIONS)
    assert list(found) == [("random", 1), ("random", 4), ("entropy", 4)]
    assert found["random", 4].exact[:2] == (1, 3) and found["random", 4].verified[:2] == (2, 3)
    assert found["random", 1].exact[:2] == (0, 1) and found["random", 1].verified.value == 0
    assert found["entropy", 4].verified[:2] == (1, 1)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of all counts that a true share can give, those whose interval holds it have about 95 % of the probability."""
    rng = np.random.default_rng(0)
    for true in (0.02, 0.3, 0.5, 0.9, 0.995):
        counts = rng.binomial(500, true, size=20_000)
        held = [wilson(int(c), 500).low <= true <= wilson(int(c), 500).high for c in np.unique(counts)]
        covered = dict(zip(np.unique(counts), held, strict=True))
        assert 0.91 < np.mean([covered[c] for c in counts]) < 0.99


def test_the_interval_at_its_ends():
    none, all_ = wilson(0, 100), wilson(100, 100)
    assert none.low == 0 and all_.high == 1
    assert none.high == pytest.approx(1 - all_.low) == pytest.approx(0.0370, abs=1e-4)  # z^2 / (n + z^2)
    assert wilson(50, 100).low == pytest.approx(0.4038, abs=1e-4)


@pytest.mark.parametrize("count, total", [(0, 0), (3, 2), (-1, 2)])
def test_no_share_of_nothing(count, total):
    with pytest.raises(ValueError, match="is no share"):
        wilson(count, total)


def test_no_accuracy_without_predictions():
    with pytest.raises(ValueError, match="is no share"):
        accuracy(TASK, [])


def test_predictions_come_back(tmp_path):
    write_predictions(tmp_path / "p.jsonl", PREDICTIONS)
    assert read_predictions(tmp_path / "p.jsonl") == PREDICTIONS
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_predictions_without_a_decoding_are_easiest_first_or_token_by_token(tmp_path):
    older = [{"prompt": "3", "answer": "4", "prediction": "4", "passes": passes, "nfe": 9} for passes in (0, 4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in older))
    assert [one.way for one in read_predictions(tmp_path / "p.jsonl")] == [TOKENS, ("confidence", 4)]


@pytest.mark.parametrize("line", ['{"prompt": "3"}', "3", "{"])
def test_what_is_no_prediction(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1: no prediction"):
        read_predictions(tmp_path / "p.jsonl")
