"""Tiny runs that begin with one another: a causal one of ours, and somebody's Llama, converted."""

import pytest

from diffusion_lm.build import build, load_for_inference
from diffusion_lm.config import Config, Data
from diffusion_lm.convert import loading
from diffusion_lm.convert.huggingface import write_folder
from diffusion_lm.models.base import DenoiserSpec, FromInit
from diffusion_lm.nn.lora import Full
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train, run


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "text.txt"
    path.write_text("\n".join(f"the cat sat on mat {i}" for i in range(200)))
    return path


def config_of(text, objective, model=FromInit(), trainable=Full(), **train):  # noqa: B008 (immutable)
    return Config(
        data=Data(path=str(text), document_unit="line", seq_len=16, tokenizer_kind="char", vocab_size=400),
        model=model,
        process=Absorbing(),
        objective=objective,
        trainable=trainable,
        train=Train(**({"steps": 2, "batch_size": 4, "eval_every": 0, "eval_batches": 1} | train)),
        checkpoint=Checkpointing(save_every=2),
    )


def trained(config, workdir):
    made = build(config, workdir)
    run(made.job, made.config.train, workdir, made.checkpoints)
    return load_for_inference(workdir)


def drawn(config, workdir):
    """A run that saved what it began with."""
    made = build(config, workdir)
    made.checkpoints.save(1, made.job.initial(), made.job.batches.get_state(), made.job.meta)
    made.checkpoints.close()
    return load_for_inference(workdir)


@pytest.fixture(scope="session")
def causal(lines, tmp_path_factory):
    """Workdir and model of an autoregressive run of ours."""
    home = tmp_path_factory.mktemp("causal")
    spec = DenoiserSpec(width=16, layers=2, heads=2, mlp_dim=16)
    return home, drawn(config_of(lines, AutoregressiveLoss(), spec), home)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Workdir and model of somebody's tiny Llama."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")
    from convert.test_loading import CONFIG, tensors, tokenizer_files

    home = tmp_path_factory.mktemp("converted")
    write_folder(home / "source", CONFIG, tensors().items(), tokenizer_files())
    loading.save(loading.load_source(home / "source"), home / "run")
    return home / "run", load_for_inference(home / "run")
