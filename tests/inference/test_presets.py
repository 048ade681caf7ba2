"""The text samplers that fit a trained run: their limits, and what they return."""

import dataclasses
import itertools
import re
import types

import pytest
from support.loaded import loaded

from configs import tinyshakespeare
from diffusion_lm.inference import autotune, by_name, pipeline, presets
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.drafting import Drafting
from diffusion_lm.samplers.drafters import PromptLookup, TiDARDraft, TrainedDraft
from diffusion_lm.samplers.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"canvas_length": 1000, "denoising_steps": 4}, "wider than the model's context"),
        ({"canvas_length": -1, "denoising_steps": 4}, "canvas_length must be at least 1"),
        ({"canvas_length": 16, "denoising_steps": 0}, "denoising_steps must be at least 1"),
        ({"canvas_length": 16, "denoising_steps": 10**9}, "denoising_steps must be at most"),
    ],
)
def test_impossible_canvases_are_refused(model, arguments, cause):
    with pytest.raises(ValueError, match=cause):
        presets.confidence(model, sampling=SamplingParams(), **arguments)


@pytest.mark.parametrize("kind", tinyshakespeare.KINDS)
def test_a_refusal_names_a_sampler_that_fits(kind):
    """Every sampler, for every kind of network: it is made, or the one it names instead is."""
    process, objective = tinyshakespeare.KINDS[kind]
    model = loaded(objective, process)
    refused = {}
    for name in set(by_name.SAMPLERS) - {"auto", "speculative"}:  # these measure; they ask the others
        try:
            by_name.make_sampler(model, name)
        except ValueError as error:
            refused[name] = str(error)
    for cause in refused.values():
        (instead,) = re.findall(r"(?:use|sample with) (\w+)$", cause)
        by_name.make_sampler(model, instead)
    assert refused.keys() < by_name.SAMPLERS.keys() - {by_name.default_name(model)} and refused


def test_masked_drafts_need_a_network_trained_on_masks(model):
    config = dataclasses.replace(model.config, objective=AutoregressiveLoss())
    with pytest.raises(ValueError, match="TiDARDraft needs a network trained on canvases of masks"):
        presets.speculative(model._replace(config=config), sampling=SamplingParams(), drafter=TiDARDraft())


def _drafting(model, masks):
    return model._replace(config=dataclasses.replace(model.config, objective=Drafting(draft_length=masks)))


@pytest.mark.parametrize(
    ("pass_s", "chosen"),
    [
        (lambda width: 1.0, TiDARDraft(num_tokens=4, causal=True)),  # a pass of any width takes a step's time
        (lambda width: 1.0 + (width > 5) * 0.8, TiDARDraft(num_tokens=2, causal=True)),
        (lambda width: 1.0 + (width > 5) * 2.0, TrainedDraft(num_tokens=5)),
        (lambda width: 1.0 + (width > 5) * 20.0, TrainedDraft(num_tokens=3)),
        (lambda width: width, PromptLookup()),  # nothing is gained
    ],
)
def test_the_shape_and_the_number_of_masks_are_those_that_are_fastest_here(model, monkeypatch, pass_s, chosen):
    monkeypatch.setattr(autotune, "pass_seconds", lambda model, widths: [pass_s(width) for width in widths])

    def cost(model, plain, sampler):
        assert not sampler.repeats  # what is timed repeats itself, and would take no pass to draft
        return 1.5

    monkeypatch.setattr(autotune, "break_even", cost)
    found = presets.speculative(_drafting(model, 4), sampling=SamplingParams())
    assert found.drafter == chosen and found.repeats == (chosen != PromptLookup())
    monkeypatch.setattr(autotune, "break_even", lambda *_: 5.0)  # as measured, it is dear
    assert presets.speculative(_drafting(model, 4), sampling=SamplingParams()).drafter == PromptLookup()
    given = presets.speculative(_drafting(model, 4), sampling=SamplingParams(), break_even=1.0)
    assert given.drafter == TrainedDraft(num_tokens=5)  # without times


def test_times_are_of_one_pass_of_each_width(model, monkeypatch):
    """By a clock that is read before and after each timing, of 32 passes."""
    clock = itertools.count(step=16.0)
    monkeypatch.setattr(autotune, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert autotune.pass_seconds(model, (1, 5, 25)) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("prompt", "length", "cause"),
    [("x" * 64, 1, "shorten the prompt"), ("x", 0, "max_new_tokens"), ("x", 63, "max_new_tokens")],
)
def test_more_than_the_context_holds_is_refused(model, prompt, length, cause):
    text_sampler = presets.autoregressive(model, sampling=SamplingParams())
    with pytest.raises(ValueError, match=cause):
        pipeline.generate(model, text_sampler, [prompt], max_new_tokens=length, seed=0)


def test_the_same_prompt_and_seed_give_the_same_text_in_any_batch(model):
    text_sampler = presets.confidence(
        model, sampling=SamplingParams(suppressed=model.tokenizer.suppressed), canvas_length=16, denoising_steps=4
    )
    alone = pipeline.generate(model, text_sampler, ["Line 1"], max_new_tokens=20, seed=7).texts
    together = pipeline.generate(model, text_sampler, ["Line 1", "Line 22: the"], max_new_tokens=20, seed=7).texts
    assert alone[0] == together[0]


def test_the_trace_ends_in_the_text_that_is_returned(model):
    draw = SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))
    text_sampler = presets.confidence(model, sampling=draw, canvas_length=16, denoising_steps=4, record=True)
    answer = pipeline.generate(model, text_sampler, ["Line"], max_new_tokens=20, seed=1)
    last = pipeline.trace(model, answer, 0, max_new_tokens=20, title="t").frames[-1]
    prompt = len(answer.prompt_ids[0])
    assert "".join(last.tokens[prompt : prompt + 20]) == "".join(
        model.tokenizer.pieces(answer.generation.tokens[0].tolist())
    )


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["speculative", "auto"])
def test_speculative_and_auto_generate_text(model, name):
    more = {"canvas_length": 0, "denoising_steps": 2} if name == "auto" else {}
    text_sampler = getattr(presets, name)(model, sampling=SamplingParams(suppressed=model.tokenizer.suppressed), **more)
    answer = pipeline.generate(model, text_sampler, ["Line 1"], max_new_tokens=20, seed=7)
    assert answer.generation.length[0] <= 20 and answer.generation.nfe >= 2
    if name == "speculative":
        plain = presets.autoregressive(model, sampling=SamplingParams(suppressed=model.tokenizer.suppressed))
        assert answer.texts == pipeline.generate(model, plain, ["Line 1"], max_new_tokens=20, seed=7).texts
