"""A user's own parts, in a package outside diffusion_lm, by the launchers and from Python."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from extension_example.data import Sums, Utf8
from extension_example.noise import MaskGIT
from extension_example.sampler import LeftToRight
from support.commands import ROOT, call, environment, launch

import diffusion_lm as dlm
from diffusion_lm.build import load_for_inference
from diffusion_lm.config import Config, encode, from_json, load, override, to_json
from launch import sample

CONFIG = Path(__file__).parent / "extension_example/config.py"
ALLOW = "--allow_import=extension_example"


def results(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 6 steps that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    assert results(launch("train", f"--config={CONFIG}", f"--workdir={folder}", home=folder))["steps"] == 6
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The same run by the launcher, killed after its first checkpoint and started again."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = [f"--config={CONFIG}", f"--workdir={folder}"]
    command = [sys.executable, "-c", KILLED.format(arguments=["train", *arguments])]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "checkpoints/6").exists() and (folder / "checkpoints/2").exists()
    assert results(launch("train", *arguments, home=folder))["steps"] == 6
    return folder


KILLED = """
import os, runpy, signal, sys
from diffusion_lm.training import checkpoint
save = checkpoint.Checkpoints.save
def then_die(self, step, *rest):
    save(self, step, *rest)
    self.wait()
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = then_die
sys.argv = {arguments!r}
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def params(folder):
    return load_for_inference(folder, allow_import=("extension_example",)).network.params


def test_a_killed_run_resumes_bit_for_bit(whole, killed):
    for a, b in zip(jax.tree.leaves(params(whole)), jax.tree.leaves(params(killed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_loaded_with_the_users_classes(killed):
    model = load_for_inference(killed, allow_import=("extension_example",))
    assert model.tokenizer == Utf8() and model.config.data.path == Sums(below=12)
    assert type(model.config.objective) is MaskGIT and model.process.mask == 258


def test_it_is_evaluated(killed):
    found = results(launch("evaluate", f"--workdir={killed}", ALLOW, home=killed))
    assert found["objective"] == "MaskGIT" and 0 < found["canvas"]["nats_per_token"] < 20


def test_it_is_sampled_from_by_a_sampler_of_its_own(killed):
    own, prompt = "--sampler=extension_example.sampler:LeftToRight", "--prompt=3 + 4"
    steps = "--denoising_steps=4", "--canvas_length=16", "--max_new_tokens=6"
    more = "--sampler_setting=a_step=8", f"--view={killed}/steps.html"
    found = results(launch("sample", f"--workdir={killed}", ALLOW, own, prompt, *steps, *more, home=killed))
    model = dlm.load(killed, allow_import=("extension_example",))
    options = {"denoising_steps": 4, "canvas_length": 16, "max_new_tokens": 6}
    same, other = (dlm.generate(model, "3 + 4", sampler=LeftToRight, a_step=n, **options) for n in (8, 0))
    assert [text["text"] for text in found["texts"]] == list(same.texts) and found["nfe"] == same.nfe < other.nfe
    assert "step by step" in (Path(killed) / "steps.html").read_text()


def test_a_sampler_class_must_be_one(killed, capsys):
    for name, message in (
        ("extension_example.sampler:None", "--sampler: 'extension_example.sampler:None' is not a dataclass"),
        ("extension_example.sampler:LeftRight", "did you mean LeftToRight?"),
        ("extension_example.data:Utf8", "Utf8 is no sampler"),
        ("nowhere:X", "No module named 'nowhere'"),
    ):
        status, _, err = call(capsys, sample, f"--workdir={killed}", ALLOW, f"--sampler={name}", "--max_new_tokens=4")
        assert status == 2 and message in err.splitlines()[-1], err


IMPORTS = """
import sys
import diffusion_lm as dlm
from diffusion_lm.build import load_for_inference
try:
    load_for_inference({folder!r})
except ValueError as error:
    assert not [name for name in sys.modules if name.startswith("extension_example")]
    print(error)
"""


def test_nothing_is_imported_that_is_not_allowed(killed):
    command = [sys.executable, "-c", IMPORTS.format(folder=str(killed))]
    done = subprocess.run(command, cwd=ROOT, env=environment(killed), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "--allow_import=extension_example" in line and "is not a dataclass of diffusion_lm" in line


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_launchers_refuse_in_one_line(killed, name):
    done = launch(name, f"--workdir={killed}", home=killed)
    assert done.returncode == 2 and done.stdout == ""
    assert "--allow_import=extension_example" in done.stderr.splitlines()[-1]


def test_a_config_survives_json_where_its_classes_are_allowed(tmp_path):
    config = load(str(CONFIG))
    tree = json.loads(json.dumps(to_json(config)))
    assert from_json(tree, ("extension_example",)) == config
    modules = [f"extension_example.{name}" for name in ("data", "noise", "momentum")]
    assert from_json(tree, modules) == config
    for allowed in ((), ("extension",), ("extension_example.data",), ("extension_example_2",)):
        with pytest.raises(ValueError, match=r"--allow_import=extension_example"):
            from_json(tree, allowed)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert load(str(tmp_path / "config.json"), ("extension_example",)) == config


def test_fields_of_users_classes_are_set_and_checked():
    config = override(load(str(CONFIG)), ["optim.momentum=0", "data.path.below=3", "objective.weight=2"])
    assert (config.optim.momentum, config.data.path.below, config.objective.weight) == (0.0, 3, 2.0)
    with pytest.raises(ValueError, match=r"unknown key optim.momentun; did you mean optim.momentum\?"):
        override(config, ["optim.momentun=1"])
    assert override(config, ["data.path=text.txt"]).data.path == "text.txt"


def test_a_class_that_lacks_something_is_one_line():
    tree = to_json(load(str(CONFIG)))
    tree["optim"] = encode(Utf8())
    with pytest.raises(ValueError, match="optim of class Utf8 is no Optimizer: it lacks build, rate"):
        from_json(tree, ("extension_example",))


def test_only_dataclasses_of_their_own_module_are_made():
    tree = to_json(load(str(CONFIG)))
    for name in ("noise:jax", "config:Config", "data:hashlib.sha256"):
        with pytest.raises(ValueError, match="is not a dataclass of diffusion_lm, extension_example"):
            from_json({**tree, "process": {"class": f"extension_example.{name}"}}, ("extension_example",))
    with pytest.raises(ValueError, match="No module named"):
        from_json({**tree, "process": {"class": "extension_example.none:X"}}, ("extension_example",))


OWN_FILE = """
import dataclasses
from diffusion_lm.processes.absorbing import Absorbing
from extension_example import config

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Absorbing):
    pass

def get_config():
    return dataclasses.replace(config.get_config(), process=Mine())
"""


def test_a_class_in_the_config_file_itself(tmp_path, monkeypatch):
    path = tmp_path / "my_experiment.py"
    path.write_text(OWN_FILE)
    config = load(str(path))
    assert isinstance(config, Config)
    tree = to_json(config)
    assert tree["process"]["class"] == "my_experiment:Mine"
    monkeypatch.delitem(sys.modules, "my_experiment")
    with pytest.raises(ValueError, match="is its folder on PYTHONPATH"):
        from_json(tree, ("my_experiment", "extension_example"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert to_json(from_json(tree, ("my_experiment", "extension_example"))) == tree
