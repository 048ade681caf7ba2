"""The front door, on a tiny network that is trained through it."""

import dataclasses
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from extension_example.sampler import LeftToRight
from support.commands import ROOT, TEXT, environment

import diffusion_lm as dlm

TINY = {"width": 32, "layers": 1, "heads": 2, "mlp_dim": 32}


def config_of(objective, process=None, **data):
    return dlm.Config(
        data=dlm.Data(path=dlm.Texts(texts=tuple(TEXT.split("\n\n")[:200])), seq_len=64, tokenizer_kind="char", **data),
        model=dlm.DenoiserSpec(**TINY),
        process=process or dlm.Absorbing(),
        objective=objective,
        train=dlm.Train(steps=8, batch_size=4, eval_every=0),
        checkpoint=dlm.Checkpointing(save_every=4),
    )


def trained(folder, *arguments, **data):
    result = dlm.train(config_of(*arguments, **data), folder)
    assert result.steps == 8
    return dlm.load(folder)


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("joint"), dlm.Joint(block_size=16))


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("uniform"), dlm.ELBO(), dlm.Uniform())


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("ar"), dlm.AutoregressiveLoss())


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    code = "import sys, time; t = time.time(); import diffusion_lm as dlm; t = time.time() - t; " + (
        "dir(dlm); print(t, [m for m in ('jax', 'numpy', 'flax', 'orbax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    seconds, modules = done.stdout.split(" ", 1)
    assert modules.strip() == "[]" and float(seconds) < 1, done.stderr


@pytest.mark.parametrize("name", dlm.__all__)
def test_every_name_is_there(name):
    assert getattr(dlm, name).__doc__ and name in dir(dlm)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        dlm.lode  # noqa: B018


def test_one_prompt_gives_one_text(joint):
    found = dlm.generate(joint, "Line 1", max_new_tokens=20, denoising_steps=4, seed=3)
    assert str(found) == found.text == found.texts[0] and found.num_tokens == (len(found.text),)
    assert found.text == dlm.generate(joint, ["Line 1", "the"], max_new_tokens=20, denoising_steps=4, seed=3).texts[0]
    assert found.text != dlm.generate(joint, "Line 1", max_new_tokens=20, denoising_steps=4, seed=4).text
    with pytest.raises(ValueError, match=r"there are 2 texts: use \.texts"):
        dlm.generate(joint, ["a", "b"], max_new_tokens=4).text  # noqa: B018


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("confidence", {"schedule": dlm.Threshold(threshold=0.5)}),
        ("remask_cap", {"remask": dlm.Cap(eta=0.1)}),
        ("autoregressive", {}),
        ("speculative", {"break_even": 0.0}),
        (dlm.Ancestral, {"canvas_length": 8}),
        (dlm.AutoregressiveSampler, {}),
        (LeftToRight, {"denoising_steps": 4}),
    ],
    ids=str,
)
def test_samplers_by_name_and_by_class(joint, sampler, options):
    found = dlm.generate(joint, "Line", sampler=sampler, max_new_tokens=12, temperature=0.7, top_p=0.9, **options)
    assert found.nfe > 0 and "░" not in found.text
    again = dlm.generate(joint, "Line", sampler=sampler, max_new_tokens=12, temperature=0.7, top_p=0.9, **options)
    assert again.texts == found.texts


@pytest.mark.cases(1)
@pytest.mark.parametrize("sampler", ["confidence", "autoregressive"])
def test_a_stream_joins_to_the_text(joint, sampler):
    shape = {"denoising_steps": 3, "canvas_length": 8} if sampler == "confidence" else {}
    options = {"sampler": sampler, "max_new_tokens": 20, "seed": 4, **shape}
    whole, pieces = dlm.generate(joint, "Line 1", **options).text, list(dlm.stream(joint, "Line 1", **options))
    assert "".join(pieces) == whole and len(pieces) > 1 and all(pieces)
    stop = whole[7:9]
    assert "".join(dlm.stream(joint, "Line 1", stop=[stop], **options)) == whole[: whole.index(stop)]


def test_a_sampler_instance_is_taken_as_it_is(joint):
    own = LeftToRight(denoising_steps=4, eos=joint.tokenizer.eos)
    found = dlm.generate(joint, "Line", sampler=own, max_new_tokens=16)
    same = dlm.make_sampler(joint, own, canvas_length=16)
    assert found.texts == dlm.generate(joint, "Line", sampler=same, max_new_tokens=16).texts
    with pytest.raises(ValueError, match="denoising_steps: set them in the sampler"):
        dlm.generate(joint, "Line", sampler=own, denoising_steps=3)


def test_the_default_sampler_fits_the_network(joint, uniform, autoregressive):
    assert isinstance(dlm.make_sampler(joint).sampler, dlm.Confidence)
    assert isinstance(dlm.make_sampler(uniform).sampler, dlm.Ancestral)
    assert isinstance(dlm.make_sampler(autoregressive), dlm.AutoregressiveSampler)
    for model in (uniform, autoregressive):
        assert dlm.generate(model, "Line", max_new_tokens=8).num_tokens[0] <= 8


@dataclasses.dataclass(frozen=True)
class WithoutSteps(dlm.CanvasSampler):
    def query(self, state):
        raise AssertionError("never asked")


class WithoutUpdate(WithoutSteps):
    denoising_steps = 2


class AtOneTime(LeftToRight):
    def query(self, state):
        return super().query(state)._replace(t=jnp.float32(0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "nope"}, "sampler 'nope' is none of published, confidence, .*: or pass a class"),
        ({"sampler": WithoutSteps}, "WithoutSteps has no field denoising_steps, .*: add it"),
        ({"sampler": WithoutUpdate()}, "WithoutUpdate is no sampler: it lacks update: derive it from CanvasSampler"),
        ({"sampler": AtOneTime, "max_new_tokens": 8}, r"AtOneTime.query: t has shape \(\), and the 1 rows need a time"),
        ({"sampler": LeftToRight, "steps": 3}, "LeftToRight has no field steps: its fields are denoising_steps, "),
        ({"sampler": "autoregressive", "denoising_steps": 3}, "has no canvas"),
        ({"sampler": "confidence", "eta": 0.1}, "confidence: .*unexpected keyword argument 'eta'"),
        ({"sampler": dlm.Texts}, "Texts: .*texts"),
        ({"sampler": dlm.MeshShape}, "MeshShape is no sampler"),
        ({"denoising_steps": 0}, "denoising_steps must be at least 1"),
        ({"max_new_tokens": 1000}, "max_new_tokens must be 1 to"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_does_not_fit_is_one_line(joint, options, message):
    with pytest.raises(ValueError, match=message) as error:
        dlm.generate(joint, "Line", **options)
    assert "\n" not in str(error.value)


def test_infilling_returns_the_whole_text(joint):
    found = dlm.infill(joint, ["Line ", 3, " the cat"], denoising_steps=2)
    assert found.text.startswith("Line ") and found.text.endswith(" the cat")
    assert found.text == dlm.infill(joint, [["Line ", 3, " the cat"], [2, "x"]], denoising_steps=2).texts[0]
    with pytest.raises(ValueError, match="needs a hole"):
        dlm.infill(joint, ["no hole"])


def test_an_autoregressive_likelihood_is_exact(joint, autoregressive):
    texts = ["Line 3: the cat sat on the mat.", "the " * 40, "x"]
    for model in (joint, autoregressive):
        found = dlm.log_likelihood(model, texts)
        assert found.exact and not found.standard_errors.any() and (found.values < 0).all()
        assert found.num_tokens.tolist() == [len(text) + 1 for text in texts]
        for i, text in enumerate(texts):
            assert dlm.log_likelihood(model, text, seed=7).values[0] == pytest.approx(found.values[i], rel=1e-5)


def test_an_exact_likelihood_is_its_tokens(autoregressive, joint, uniform):
    """What follows changes none of them."""
    texts = ["Line 3: the cat sat", "Line 3: the cat sat on the mat. " + "the " * 40]
    for model in (joint, autoregressive):
        found = dlm.log_likelihood(model, texts)
        assert [len(own) for own in found.token_values] == found.num_tokens.tolist()
        np.testing.assert_allclose([own.sum() for own in found.token_values], found.values, rtol=1e-6)
        first, second = (own[: len(texts[0])] for own in found.token_values)
        np.testing.assert_allclose(first, second, atol=1e-4)
        assert np.unique(first).size > 3 and (first < 0).all()
    assert dlm.log_likelihood(uniform, texts).token_values == ()


def test_log_likelihoods_sum_to_the_evaluation(autoregressive):
    texts = tuple(f"Line {i}: the owl sat" for i in range(5))
    found = dlm.log_likelihood(autoregressive, texts, batch_size=2)
    nats = [dlm.evaluate(autoregressive, dlm.Texts(texts=(text,))).parts["causal"] for text in texts]
    total = [e.nats_per_token * n for e, n in zip(nats, found.num_tokens, strict=True)]
    np.testing.assert_allclose(-found.values, total, rtol=1e-5)


def test_a_bound_has_a_standard_error_and_no_neighbours(uniform):
    texts = ["Line 3: the cat", "the owl sat on the mat " * 6]
    found = dlm.log_likelihood(uniform, texts, draws=16)
    assert not found.exact and (found.standard_errors > 0).all()
    alone = dlm.log_likelihood(uniform, texts[1], draws=16)
    np.testing.assert_allclose(alone.values[0], found.values[1], rtol=1e-5)
    other = dlm.log_likelihood(uniform, texts, draws=16, seed=1)
    assert (np.abs(other.values - found.values) < 6 * np.hypot(other.standard_errors, found.standard_errors)).all()
    with pytest.raises(ValueError, match="draws must be at least 2"):
        dlm.log_likelihood(uniform, texts, draws=1)


def test_evaluation_is_on_held_out_text_or_any_other(joint, tmp_path):
    found = dlm.evaluate(joint)
    assert set(found.parts) == {"causal", "canvas"} and found.tokens > 0
    (tmp_path / "text.txt").write_text("Line 3: the cat")
    other = dlm.evaluate(joint, str(tmp_path / "text.txt"))
    assert other.bytes == len("Line 3: the cat") and other.tokens == other.bytes + 1
    exact = dlm.log_likelihood(joint, "Line 3: the cat").values[0]
    assert other.parts["causal"].nats_per_token * other.tokens == pytest.approx(-exact, rel=1e-5)


def test_training_resumes(joint, tmp_path):
    config = config_of(dlm.Joint(block_size=16))
    dlm.train(dlm.override(config, ["train.steps=4"]), tmp_path)
    start = time.time()
    assert dlm.train(config, tmp_path).steps == 8
    assert dlm.load(tmp_path, checkpoint_step=4).step == 4 and time.time() > start
