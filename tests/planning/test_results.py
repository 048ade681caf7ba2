"""Accuracies and their confidence intervals; predictions written, read and counted again."""

import json

import numpy as np
import pytest

from diffusion_lm.planning.results import (
    Prediction,
    accuracy,
    by_setting,
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


def test_another_correct_answer_is_verified_but_not_exact():
    found = by_setting(TASK, PREDICTIONS)
    assert list(found) == [("random", 1), ("random", 4), ("entropy", 4)]
    assert found["random", 4].exact[:2] == (1, 3) and found["random", 4].verified[:2] == (2, 3)
    assert found["random", 1].exact[:2] == (0, 1) and found["random", 1].verified.value == 0
    assert found["entropy", 4].verified[:2] == (1, 1)


def test_the_interval_covers_the_true_proportion_in_95_percent():
    """Counts whose interval holds the true proportion have about 95 % of the binomial probability."""
    rng = np.random.default_rng(0)
    for true in (0.02, 0.3, 0.5, 0.9, 0.995):
        counts = rng.binomial(500, true, size=20_000)
        inside = [wilson(int(c), 500).low <= true <= wilson(int(c), 500).high for c in np.unique(counts)]
        covered = dict(zip(np.unique(counts), inside, strict=True))
        assert 0.91 < np.mean([covered[c] for c in counts]) < 0.99


def test_the_interval_at_0_and_1():
    none, all_ = wilson(0, 100), wilson(100, 100)
    assert none.low == 0 and all_.high == 1
    assert none.high == pytest.approx(1 - all_.low) == pytest.approx(0.0370, abs=1e-4)  # z^2 / (n + z^2)
    assert wilson(50, 100).low == pytest.approx(0.4038, abs=1e-4)


@pytest.mark.parametrize("count, total", [(0, 0), (3, 2), (-1, 2)])
def test_an_impossible_proportion_is_refused(count, total):
    with pytest.raises(ValueError, match="is no proportion"):
        wilson(count, total)


def test_accuracy_needs_predictions():
    with pytest.raises(ValueError, match="is no proportion"):
        accuracy(TASK, [])


def test_predictions_are_read_as_written(tmp_path):
    write_predictions(tmp_path / "p.jsonl", PREDICTIONS)
    assert read_predictions(tmp_path / "p.jsonl") == PREDICTIONS
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


OLD = {"prompt": "3", "answer": "4", "prediction": "4", "decoding": "random", "passes": 4, "nfe": 9}


NEW = {"prompt": "3", "answer": "4", "prediction": "4", "decoding": "random", "denoising_steps": 4, "nfe": 9}
WRONG = (
    {"prompt": 3},
    {"answer": None},
    {"prediction": ["4"]},
    {"decoding": {}},
    {"denoising_steps": "4"},
    {"nfe": True},
)


@pytest.mark.parametrize(
    "line", ['{"prompt": "3"}', "3", "{", json.dumps(OLD), *(json.dumps(NEW | wrong) for wrong in WRONG)]
)
def test_a_line_that_is_no_prediction_is_refused(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1: not a prediction"):
        read_predictions(tmp_path / "p.jsonl")
