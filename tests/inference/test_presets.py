"""The text samplers that fit a trained run: their limits, and what they return."""

import dataclasses

import pytest

from diffusion_lm.inference import presets
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.samplers.drafters import TiDARDraft
from diffusion_lm.samplers.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"canvas": 1000, "passes": 4}, "wider than the model's context"),
        ({"canvas": -1, "passes": 4}, "canvas must be at least 1"),
        ({"canvas": 16, "passes": 0}, "passes must be at least 1"),
        ({"canvas": 16, "passes": 10**9}, "passes must be at most"),
    ],
)
def test_impossible_canvases_are_refused(model, arguments, cause):
    with pytest.raises(ValueError, match=cause):
        presets.confidence(model, draw=SamplingParams(), **arguments)


def test_masked_drafts_need_a_network_trained_on_masks(model):
    config = dataclasses.replace(model.config, objective=AutoregressiveLoss())
    with pytest.raises(ValueError, match="TiDARDraft guesses by canvases of masks"):
        presets.speculative(model._replace(config=config), draw=SamplingParams(), drafter=TiDARDraft())


@pytest.mark.parametrize(
    ("prompt", "length", "cause"), [("x" * 64, 1, "shorten the prompt"), ("x", 0, "length"), ("x", 63, "length")]
)
def test_more_than_the_context_holds_is_refused(model, prompt, length, cause):
    writer = presets.autoregressive(model, draw=SamplingParams())
    with pytest.raises(ValueError, match=cause):
        presets.write(model, writer, [prompt], length=length, seed=0)


def test_the_same_prompt_and_seed_give_the_same_text_in_any_batch(model):
    writer = presets.confidence(model, draw=SamplingParams(suppressed=model.tokenizer.suppressed), canvas=16, passes=4)
    alone = presets.write(model, writer, ["Line 1"], length=20, seed=7).texts
    together = presets.write(model, writer, ["Line 1", "Line 22: the"], length=20, seed=7).texts
    assert alone[0] == together[0]


def test_the_trace_ends_in_the_text_that_is_returned(model):
    draw = SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))
    writer = presets.confidence(model, draw=draw, canvas=16, passes=4, record=True)
    answer = presets.write(model, writer, ["Line"], length=20, seed=1)
    last = presets.trace(model, answer, 0, length=20, title="t").frames[-1]
    prompt = len(answer.prompts[0])
    assert "".join(last.tokens[prompt : prompt + 20]) == "".join(
        model.tokenizer.pieces(answer.generation.tokens[0].tolist())
    )


@pytest.mark.parametrize("name", ["speculative", "auto"])
def test_speculative_and_auto_generate_text(model, name):
    more = {"canvas": 0, "passes": 2} if name == "auto" else {}
    writer = getattr(presets, name)(model, draw=SamplingParams(suppressed=model.tokenizer.suppressed), **more)
    answer = presets.write(model, writer, ["Line 1"], length=20, seed=7)
    assert answer.generation.length[0] <= 20 and answer.generation.nfe >= 2
    if name == "speculative":
        plain = presets.autoregressive(model, draw=SamplingParams(suppressed=model.tokenizer.suppressed))
        assert answer.texts == presets.write(model, plain, ["Line 1"], length=20, seed=7).texts
