"""Second thoughts as they are asked for: from Python and from `launch.sample`, on a model of three steps' training."""

import json

import pytest
from support.commands import SMALL, TEXT, launch

from diffusion_lm.build import load_for_inference
from diffusion_lm.inference import presets
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    settings = [f"--set={s}" for s in (*SMALL, "train.steps=3", f"data.path={folder}/text.txt")]
    done = launch("train", "--config=configs/quickstart.py", f"--workdir={folder}/work", *settings, home=folder)
    assert done.returncode == 0, done.stderr
    return folder / "work"


@pytest.fixture(scope="module")
def model(workdir):
    return load_for_inference(workdir)


def test_passes_are_what_second_thoughts_cost(model, quick_compile):
    draw = SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))
    plain = presets.confidence(model, draw=draw, canvas=16, passes=4)
    revised = presets.revised(model, plain, rounds=2, span=3)
    remasked = presets.remasking(model, draw=draw, canvas=16, passes=40)
    for writer, cost in ((plain, 4), (revised, 4 + 2 * (3 + 1)), (remasked, 40)):
        answer = presets.write(model, writer, ["Line 3:"], length=8, seed=0)
        assert answer.generation.nfe == 1 + cost and answer.generation.length[0] == 8


def test_sample_shows_second_thoughts(workdir, tmp_path):
    page = tmp_path / "canvas.html"
    options = ("--sampler=remask_rescale", "--dial=0.5", "--passes=9", "--rounds=1", f"--view={page}", "--length=9")
    done = launch("sample", f"--workdir={workdir}", *options, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["nfe"] > 9 and page.stat().st_size > 1_000


@pytest.mark.parametrize("option", ["--rounds=2", "--correct=2"])
def test_what_does_not_go_together_is_refused_in_a_line(workdir, tmp_path, option):
    done = launch("sample", f"--workdir={workdir}", "--sampler=autoregressive", option, home=tmp_path)
    assert done.returncode != 0 and option.split("=")[0] in done.stderr.splitlines()[-1]


def test_other_noise_has_no_masks_to_lay_again(model):
    model = model._replace(process=Uniform(mask=model.tokenizer.mask))
    draw = SamplingParams()
    corrected = presets.ancestral(model, draw=draw, canvas=16, passes=8, correct=4)
    assert corrected.sampler.correct == 4
    with pytest.raises(ValueError, match="use ancestral"):
        presets.revised(model, corrected, rounds=1, span=2)
    with pytest.raises(ValueError, match="use ancestral"):
        presets.remasking(model, draw=draw, canvas=16, passes=8)
