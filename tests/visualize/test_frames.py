"""The state of each position after each denoising step, derived from the tokens alone."""

import numpy as np
import pytest

from diffusion_lm.visualize.frames import EMPTY, END_OF_TEXT, Frame, State, Trace, trace_from_history

M, E = 9, 0  # mask, end of text
NAMES = ["", "a", " b", "\n", ""]


def traced(tokens, confidence=None, **given):
    tokens = np.array(tokens, np.int32)
    confidence = np.full(tokens.shape, 0.5, np.float32) if confidence is None else np.array(confidence, np.float32)
    options = {"prompt_length": 1, "length": tokens.shape[1], "mask": M, "eos": E, "title": "t"} | given
    return trace_from_history(tokens, confidence, texts=lambda ids: [NAMES[i] for i in ids], **options)


def states(trace):
    return ["".join(str(int(s)) for s in frame.state) for frame in trace.frames]


def test_masked_then_just_committed_then_earlier():
    trace = traced([[1, M, 2, M], [1, 1, 2, M], [1, 1, 2, 3]])
    assert states(trace) == ["3000", "3010", "3120", "3221"]
    assert trace.frames[-1].tokens == ("a", "a", " b", "\n")
    assert [frame.committed for frame in trace.frames] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_remasked_token_is_masked_and_a_changed_one_is_just_committed():
    trace = traced([[1, 1, 1], [1, M, 2], [1, 1, 2]], [[0, 0.1, 0.2], [0, 0.3, 0.4], [0, 0.5, 0.6]])
    assert states(trace) == ["300", "311", "301", "312"]
    assert trace.frames[2].tokens == ("a", "", " b")
    confidence = np.stack([frame.confidence for frame in trace.frames])
    np.testing.assert_allclose(confidence[:, 1], [np.nan, 0.1, np.nan, 0.5])
    np.testing.assert_allclose(confidence[:, 2], [np.nan, 0.2, 0.4, 0.4])


def test_positions_after_the_end_of_text_are_unused_until_it_moves():
    trace = traced([[1, M, M, E, 2], [1, E, M, E, 2], [1, 1, 2, 2, E]])
    assert states(trace) == ["30000", "30014", "31444", "31111"]
    assert trace.frames[2].tokens == ("a", END_OF_TEXT, "", "", "")


def test_a_prompt_keeps_its_own_end_of_text_and_length_cuts_the_row():
    assert states(traced([[E, 1, M, M]], length=3)) == ["3004", "3104"]


def test_without_an_end_of_text_every_position_is_used():
    assert states(traced([[1, E, 1]], eos=None)) == ["300", "311"]


def test_a_committed_token_without_text_is_visible():
    assert traced([[1, 4]]).frames[-1].tokens[1] == EMPTY


def test_steps_are_counted_from_one_in_each_canvas():
    trace = traced([[1, 1, M], [1, 1, M], [1, 1, 2]], canvas=np.array([0, 0, 1]))
    assert [(frame.canvas, frame.step) for frame in trace.frames] == [(0, 0), (0, 1), (0, 2), (1, 1)]
    assert trace.caption(trace.frames[2]) == "canvas 1 of 2 · denoising step 2 of 2 · 1 of 2 committed"
    assert trace.caption(trace.frames[3]) == "canvas 2 of 2 · denoising step 1 of 1 · 2 of 2 committed"


@pytest.mark.parametrize(
    ("tokens", "given", "complaint"),
    [
        ([[M, 1]], {}, "the prompt holds a mask"),
        ([[1, 1], [2, 1]], {}, "changes between steps"),
        ([[1, 1]], {"prompt_length": 3}, "prompt_length 3"),
        ([[1, 1]], {"length": 3}, "length 3"),
        ([[1, 1]], {"confidence": [[0.5]]}, "give both as"),
        ([[1, 1]], {"confidence": [[0.5, 1.5]]}, "outside 0..1"),
        ([[1, 1]], {"canvas": np.zeros(2, int)}, "canvas of each step"),
        (np.zeros((0, 2)), {}, "not empty"),
    ],
)
def test_an_inconsistent_history_is_refused(tokens, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        traced(tokens, **given)


def test_texts_must_return_one_for_each_id():
    with pytest.raises(ValueError, match="one for each"):
        trace_from_history(
            np.array([[1, 2]]),
            np.ones((1, 2)),
            prompt_length=0,
            length=2,
            mask=M,
            eos=E,
            texts=lambda ids: ["joined"],
            title="t",
        )


def test_inconsistent_frames_and_traces_are_refused():
    def frame(n=2, state=(0, 1)):
        return Frame(tokens=["x"] * n, state=np.array(state), confidence=np.full(n, np.nan), canvas=0, step=0)

    with pytest.raises(ValueError, match="shape"):
        frame(n=3)
    with pytest.raises(ValueError, match="State"):
        frame(state=(0, len(State)))
    with pytest.raises(ValueError, match="no frames"):
        Trace(title="t", frames=())
    with pytest.raises(ValueError, match="differ"):
        Trace(title="t", frames=(frame(), frame(1, (0,))))
