"""Revision and remasking, from Python and from launch.sample, on the small trained network."""

import json

import pytest
from support.commands import call

from diffusion_lm.inference import pipeline, presets
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.sampling_params import SamplingParams
from launch import sample


def test_revision_and_remasking_cost_their_passes(model):
    draw = SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))
    plain = presets.confidence(model, sampling=draw, canvas_length=16, denoising_steps=4)
    revised = presets.revised(model, plain, rounds=2, span=3)
    remasked = presets.remasking(model, sampling=draw, canvas_length=16, denoising_steps=40)
    for writer, cost in ((plain, 4), (revised, 4 + 2 * (3 + 1)), (remasked, 40)):
        answer = pipeline.generate(model, writer, ["Line 3:"], max_new_tokens=8, seed=0)
        assert answer.generation.nfe == 1 + cost and answer.generation.length[0] == 8


def test_a_page_shows_remasking_and_revision(trained, tmp_path, capsys):
    page = tmp_path / "canvas.html"
    options = (
        "--sampler=remask_rescale",
        "--eta=0.5",
        "--denoising_steps=9",
        "--revise_rounds=1",
        f"--view={page}",
        "--max_new_tokens=9",
    )
    status, out, err = call(capsys, sample, f"--workdir={trained[0]}/work", *options)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["nfe"] > 9 and page.stat().st_size > 1_000


@pytest.mark.parametrize("option", ["--revise_rounds=2", "--corrector_steps=2"])
def test_an_autoregressive_sampler_has_neither(trained, capsys, option):
    status, _, err = call(capsys, sample, f"--workdir={trained[0]}/work", "--sampler=autoregressive", option)
    assert status == 2 and option.split("=")[0] in err.splitlines()[-1]


def test_both_need_masks(model):
    model = model._replace(process=Uniform(mask=model.tokenizer.mask))
    draw = SamplingParams()
    corrected = presets.ancestral(model, sampling=draw, canvas_length=16, denoising_steps=8, corrector_steps=4)
    assert corrected.sampler.corrector_steps == 4
    with pytest.raises(ValueError, match="use ancestral"):
        presets.revised(model, corrected, rounds=1, span=2)
    with pytest.raises(ValueError, match="use ancestral"):
        presets.remasking(model, sampling=draw, canvas_length=16, denoising_steps=8)
