"""What samples are judged by, against hand counts and the enumerable world."""

import numpy as np
import pytest
from support.oracle import TEXTS, Oracle, truth

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.evaluation import generation_quality
from diffusion_lm.types import Alignment, DenseLogits


def test_the_judge_reads_from_left_to_right():
    """Summed over the positions behind the first, -log p(text | its first token), by the table."""
    p = truth()
    first = np.bincount(TEXTS[:, 0], weights=p)[TEXTS[:, 0]]
    np.testing.assert_allclose(
        np.asarray(generation_quality.judged(Oracle(), TEXTS)).sum(axis=1), -np.log(p / first), atol=1e-5
    )


def test_entropy_and_repetition_by_hand():
    assert generation_quality.entropy(np.array([[5, 5], [5, 5]])) == 0
    assert generation_quality.entropy(np.array([1, 2, 1, 2])) == pytest.approx(np.log(2))
    assert generation_quality.repeated(np.arange(8)) == 0
    assert generation_quality.repeated(np.array([1, 2, 1, 2, 1, 2, 1])) == pytest.approx(1 - 2 / 4)
    assert generation_quality.repeated(np.full(13, 7)) == pytest.approx(0.9)


def even(tokens, t, *, attention, positions, segment_ids, alignment=Alignment.NEXT):
    return DenseLogits(values=np.zeros((*tokens.shape, 10), np.float32), alignment=alignment)


def test_quality_is_of_what_was_written():
    """A judge that knows nothing: log 10 for everything. What was given is counted nowhere."""
    rows = np.array([[1, 1, 1, 1, 1, 2, 3, 4], [1, 1, 1, 1, 1, 2, 3, 4]])
    found = generation_quality.quality(generation_quality.judged(even, rows), rows, 4)
    assert found == pytest.approx((np.log(10), 0, np.log(4), 0), abs=1e-6)


def test_the_standard_error_is_that_of_a_mean_over_texts():
    """Texts at 1 and 3 nats a token: sqrt(2) apart from their mean, in the sample's sense, over sqrt(2)."""
    found = generation_quality.quality(np.array([[9.0, 1, 1, 1, 1], [9.0, 3, 3, 3, 3]]), np.zeros((2, 5), int), 1)
    assert found[:2] == pytest.approx((2.0, 1.0))


def test_the_judge_is_asked_as_of_clean_text_in_one_document():
    def judge(tokens, t, *, attention, positions, segment_ids):
        assert attention == Causal() and (t == 0).all() and (segment_ids == 1).all()
        assert (positions == np.arange(9)[None]).all()
        return even(tokens, t, attention=attention, positions=positions, segment_ids=segment_ids)

    assert generation_quality.judged(judge, np.zeros((4, 9), int)).shape == (4, 9)


@pytest.mark.parametrize(("shape", "given"), [((1, 9), 2), ((4, 5), 2), ((4, 9), 0)])
def test_too_little_to_judge_is_refused(shape, given):
    with pytest.raises(ValueError, match="measure at least 2 texts"):
        generation_quality.quality(np.zeros(shape), np.zeros(shape, int), given)


def test_a_judge_that_reads_both_ways_is_none():
    same = lambda *args, **kwargs: even(*args, **kwargs, alignment=Alignment.SAME)  # noqa: E731
    with pytest.raises(ValueError, match="next token"):
        generation_quality.judged(same, np.zeros((4, 9), int))
