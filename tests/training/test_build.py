"""A real model, tokenizer and loader through build, run and the launcher."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support.commands import environment

from diffusion_lm import lock
from diffusion_lm.build import build, load_for_inference
from diffusion_lm.config import Config, Data, override
from diffusion_lm.data.tokenizer import train_tokenizer
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training import metrics
from diffusion_lm.training.checkpoint import CheckpointError, Checkpointing
from diffusion_lm.training.loop import Train, run
from diffusion_lm.training.optimizer import Muon

ROOT = Path(__file__).parents[2]
TEXT = "\n".join(f"{i} bottles of {word}" for i in range(60) for word in ("beer", "milk", "ink", "tea"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return Config(
        data=Data(path=str(path), document_unit="line", seq_len=16, tokenizer_kind="char", vocab_size=400),
        model=DenoiserSpec(width=16, layers=1, heads=2, mlp_dim=16),
        process=Absorbing(),
        objective=BlockELBO(block_size=4),
        optim=Muon(),  # both kinds of state: it moves embeddings and norms by AdamW
        train=Train(steps=6, batch_size=4, log_every=1, eval_every=3, eval_batches=2, ema_decay=0.9),
        checkpoint=Checkpointing(save_every=2),
    )


def train(config, workdir):
    built = build(config, workdir)
    return run(built.job, config.train, workdir, built.checkpoints)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    return train(config, workdir), workdir


def test_stopped_and_resumed_equals_uninterrupted(config, trained, tmp_path):
    """Where the run stops, the learning rate's course still aims at the full number of steps."""
    built = build(config, tmp_path)
    batches = built.job.batches

    class Stopping:
        get_state, set_state = batches.get_state, batches.set_state
        seen = 0

        def __next__(self):
            self.seen += 1
            if self.seen == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(batches)

    stopped = run(
        built.job.__class__(**{**vars(built.job), "batches": Stopping()}), config.train, tmp_path, built.checkpoints
    )
    assert stopped.interrupted and stopped.steps == 3
    assert train(config, tmp_path).steps == 6
    assert metrics.read(tmp_path) == metrics.read(trained[1])
    for ema in (True, False):
        one, other = (load_for_inference(workdir, ema=ema) for workdir in (tmp_path, trained[1]))
        jax.tree.map(np.testing.assert_array_equal, one.network.params, other.network.params)


def test_a_trained_model_comes_back_whole(config, trained):
    result, workdir = trained
    model = load_for_inference(workdir)
    assert (model.config, model.step) == (config, 6)
    assert model.tokenizer.decode(model.tokenizer.encode("7 bottles of ink")) == "7 bottles of ink"
    assert model.process.mask == model.tokenizer.vocab
    loss = build(config, workdir).job.evaluate(model.network.params)  # the averaged parameters are those evaluated
    assert loss["valid/canvas"] == pytest.approx(result.values["valid/canvas"], rel=1e-6)
    assert load_for_inference(workdir, step=4).step == 4
    with pytest.raises(CheckpointError, match=r"holds no step 5, only \[2, 4, 6\]"):
        load_for_inference(workdir, step=5)


def test_a_learning_rate_that_jumps_on_resume_is_reported(config, tmp_path, caplog):
    """To the end of the cosine, then twice as many steps; the setting that the line names continues smoothly."""
    config = override(config, ["optim.schedule.warmup=0", "train.eval_every=0", "checkpoint.save_every=6"])
    train(config, tmp_path)
    longer = override(config, ["train.steps=12"])

    def reported(config):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build(config, tmp_path)
        return [record.message for record in caplog.records if "learning rate" in record.message]

    assert reported(config) == []
    (line,) = reported(longer)
    pattern = r"the learning rate at step 6 changes from 0\.0001 to (0\.000\d+): set (optim\.lr=[\d.e-]+) to continue"
    found = re.match(pattern, line)
    assert float(found[1]) == pytest.approx(float(longer.optim.rate(12)(6)), rel=1e-3)
    assert reported(override(longer, [found[2]])) == []


def test_two_runs_in_one_workdir(config, tmp_path):
    """The second one says so before it reads anything."""
    with lock.hold(tmp_path / lock.NAME), pytest.raises(lock.InUseError, match="is in use by process"):
        build(override(config, ["data.path=nothing.txt"]), tmp_path)


@pytest.fixture
def changed_text(config, tmp_path):
    path = tmp_path / "other.txt"
    path.write_text(TEXT + "\nand one more")
    return f"data.path={path}"


@pytest.fixture
def other_tokenizer(tmp_path):
    path = tmp_path / "other.model"
    path.write_bytes(train_tokenizer(["something else"], vocab=400, kind="char").proto)
    return f"data.tokenizer={path}"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.layers=2", r"doesn't match .*checkpoints/6: model.layers=2 \(it has 1\)"),
        ("objective.block_size=2", r"doesn't match .*: objective.block_size=2 \(it has 4\)"),
        ("data.seq_len=32", r"doesn't match .*: data.seq_len=32 \(it has 16\)"),
        ("train.ema_decay=0", r"doesn't match .*: train.ema_decay=0.0 \(it has 0.9\)"),
        ("seed=1", r"doesn't match .*: seed=1 \(it has 0\)"),
        ("changed_text", "not the text that the checkpoint was trained on"),
        ("other_tokenizer", "is not the checkpoint's tokenizer"),
    ],
)
def test_another_experiment_is_refused(config, trained, setting, message, request):
    setting = setting if "=" in setting else request.getfixturevalue(setting)
    with pytest.raises(ValueError, match=message) as error:
        build(override(config, [setting]), trained[1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.path=nothing.txt", "data.path.*nothing.txt"),
        ("data.seq_len=18", "blocks of 4 do not divide rows of 18"),
        ("data.seq_len=100000", "don't fill a row of 100000"),
        ("train.batch_size=4000", "a batch of 4000 rows can't be made"),
        ("data.tokenizer=nothing.model", "nothing.model"),
        ("mesh.tensor=3", "don't multiply to the 1 device"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(config, tmp_path, setting, message):
    workdir = tmp_path / "workdir"
    with pytest.raises((ValueError, OSError), match=message) as error:
        build(override(config, [setting]), workdir)
    assert "\n" not in str(error.value)
    assert not workdir.exists()


CONFIG_FILE = """
from diffusion_lm.config import Config, from_json
def get_config():
    return from_json({json!r})
"""


def launch(*flags, home):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.train", *flags],
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory):
    from diffusion_lm.config import to_json

    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG_FILE.format(json=to_json(config)))
    return path


def test_the_launcher_saves_and_exits_0_on_sigterm(config_file, tmp_path):
    workdir = tmp_path / "workdir"
    flags = f"--config={config_file}", f"--workdir={workdir}", "--set=train.steps=1000000"
    with launch(*flags, home=tmp_path) as process:
        deadline = time.monotonic() + 120
        while not (workdir / metrics.FILE).exists() or not metrics.read(workdir):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["interrupted"] is True and result["loss"] > 0
    assert Path(result["checkpoint"]).name == str(result["steps"]) and Path(result["checkpoint"]).is_dir()


def test_the_launcher_says_what_is_wrong_in_one_line(config_file, tmp_path):
    workdir = tmp_path / "workdir"
    with launch(f"--config={config_file}", f"--workdir={workdir}", "--set=optim.rate=1", home=tmp_path) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err.startswith("error: unknown key optim.rate; did you mean optim.") and err.count("\n") == 1
    assert not workdir.exists()
