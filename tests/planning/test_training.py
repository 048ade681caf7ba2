"""A task as a config's data: resuming changes nothing, and another task or test file is refused."""

import json

import numpy as np
import pytest

from diffusion_lm.build import build, load_for_inference, read_text
from diffusion_lm.config import Config, override
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.planning.data import Examples, min_seq_len
from diffusion_lm.planning.tasks.countdown import Countdown
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train, run
from diffusion_lm.training.optimizer import AdamW, WarmupStableDecay

TASK, OBJECTIVE = Countdown(numbers=2), Joint(block_size=8)


def config(steps, **data):
    return Config(
        data=Examples(task=TASK, seq_len=min_seq_len(TASK, OBJECTIVE.layout), valid=6, **data),
        model=DenoiserSpec(width=16, layers=1, heads=2, mlp_dim=16),
        process=Absorbing(),
        objective=OBJECTIVE,
        optim=AdamW(schedule=WarmupStableDecay(warmup=0, decay=0)),  # independent of the number of steps
        train=Train(steps=steps, batch_size=4, eval_every=0, eval_batches=2, log_every=1),
        checkpoint=Checkpointing(save_every=2),
    )


def trained(workdir, *parts):
    for part in parts:
        built = build(part, workdir)
        result = run(built.job, part.train, workdir, built.checkpoints)
    return built, result


def test_resuming_changes_nothing_and_another_task_or_test_file_is_refused(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"input": "9,3,12", "output": "9+3=12"}))
    test = str(path)
    once, whole = trained(tmp_path / "once", config(4, test=test))
    twice, parts = trained(tmp_path / "twice", config(2, test=test), config(4, test=test))
    assert parts.values == pytest.approx(whole.values, rel=1e-6) and "valid/canvas" in whole.values
    assert once.job.batches.get_state() == twice.job.batches.get_state() == {"next_batch": 4}
    models = [load_for_inference(tmp_path / folder) for folder in ("once", "twice")]
    np.testing.assert_array_equal(*(model.network.params["embedding"] for model in models))
    assert models[0].tokenizer.vocab == len(TASK.alphabet) + 3

    with pytest.raises(ValueError, match=r"data\.task\.numbers=3"):
        build(override(config(4, test=test), ["data.task.numbers=3", "data.seq_len=80"]), tmp_path / "once")
    path.write_text(json.dumps({"input": "9,4,13", "output": "9+4=13"}))
    with pytest.raises(ValueError, match=r"data\.test=.* isn't the test file that the checkpoint kept out"):
        build(config(4, test=test), tmp_path / "once")


def test_a_task_is_not_a_text_corpus():
    with pytest.raises(ValueError, match=r"data=Examples is not a text corpus.*launch\.planning\.scoreboard"):
        read_text(config(2))
