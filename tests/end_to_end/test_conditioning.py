"""Networks with self-conditioning, time, learned noise or embeddings: trained, sampled and distilled from configs."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_lm.build import build, load_for_inference
from diffusion_lm.config import load, override
from diffusion_lm.inference import pipeline, presets
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.training import loop

ROOT = Path(__file__).parents[2]
SMALL = (
    "model.width=16 model.layers=1 model.heads=2 model.mlp_dim=16 train.steps=3 train.batch_size=4 train.eval_batches=1"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{i} green bottles hang on wall {i % 7}, and {i * i} more" for i in range(60)))
    return path


def config_of(kind, text, *settings):
    """The kind of configs/tinyshakespeare.py, small."""
    places = [f"data.path={text}", "data.seq_len=32", "train.eval_every=0", "checkpoint.save_every=3"]
    return override(load(f"{ROOT}/configs/tinyshakespeare.py:{kind}"), [*SMALL.split(), *places, *settings])


def trained(kind, text, home, *settings):
    """The result of three updates, and the loaded run."""
    config = config_of(kind, text, *settings)
    run = build(config, home)
    return loop.run(run.job, config.train, home, run.checkpoints), load_for_inference(home)


def asked(model, **rest):
    sampling = SamplingParams(suppressed=model.tokenizer.suppressed)
    return {"sampling": sampling, "canvas_length": 0, "denoising_steps": 3, **rest}


def test_a_uniform_canvas_over_a_causal_prefix(text, tmp_path):
    """Like DiffusionGemma, end to end; what it doesn't support is refused."""
    result, model = trained("joint_uniform", text, tmp_path)
    assert np.isfinite(result.values["loss/canvas"]) and np.isfinite(result.values["loss/causal"])
    assert "self_conditioning" in model.network.params
    answer = pipeline.generate(model, presets.renoising(model, **asked(model)), ["7 green"], max_new_tokens=16, seed=0)
    assert 0 < answer.generation.nfe <= 5 and answer.generation.tokens.shape == (1, 16)
    with pytest.raises(ValueError, match="self-conditioned"):
        presets.particles(model, num_particles=2, **asked(model))


@pytest.fixture(scope="module")
def flow(text, tmp_path_factory):
    home = tmp_path_factory.mktemp("flow")
    return home, *trained("embedding", text, home, "train.eval_every=3")


def test_a_flow_of_vectors(flow):
    """The reported loss is the bound, not the training loss."""
    _, result, model = flow
    assert result.values["valid/canvas"] > 1.0 and model.process.width == 16
    writer = presets.reverse_process(model, **asked(model))
    answer = pipeline.generate(model, writer, ["7 green"], max_new_tokens=20, seed=0)
    assert answer.generation.nfe == 3 and (answer.generation.tokens < model.tokenizer.mask).all()
    for other in (presets.ancestral, presets.confidence):
        with pytest.raises(ValueError, match="use embedding_flow"):
            other(model, **asked(model))


def test_exponents_are_learned_with_the_network(text, tmp_path):
    """They are loaded with the network, and sampling uses them."""
    result, model = trained("learned", text, tmp_path / "learned", "train.eval_every=3", "train.ema_decay=0.5")
    powers = np.array(model.process.powers)
    assert powers.shape == (model.tokenizer.mask,) and 0 < np.abs(np.log(powers)).max() < 0.01
    np.testing.assert_allclose(np.exp(model.network.params["noise"]["log_powers"]), powers, rtol=1e-6)
    assert np.isfinite(result.values["valid/canvas"]) and build(model.config, tmp_path / "learned").job.flops() > 0
    answer = pipeline.generate(
        model, presets.reverse_process(model, **asked(model)), ["7 green"], max_new_tokens=20, seed=0
    )
    assert (answer.generation.tokens < model.tokenizer.mask).all()
    for half in ({"objective": ELBO()}, {"process": Absorbing()}):
        with pytest.raises(ValueError, match="need each other"):
            build(dataclasses.replace(model.config, **half), tmp_path / "other")


def test_a_student_begins_as_its_teacher(text, flow, tmp_path):
    home, _, teacher = flow
    named = f"objective.teacher={home}"
    student = build(config_of("distilled_embedding", text, named), tmp_path / "student").job.initial().params
    jax.tree.map(np.testing.assert_array_equal, student, teacher.network.params)
    for setting, cause in (
        ("objective.teacher=", "needs a trained workdir"),
        ("model.tie_embeddings=false", "has another model"),
        ("process.noise=2", "has another process"),
    ):
        with pytest.raises(ValueError, match=cause):
            build(config_of("distilled_embedding", text, named, setting), tmp_path / "other")
