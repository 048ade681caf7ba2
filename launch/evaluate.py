"""Evaluates a trained network's likelihood of text, under the objective that it was trained with.

    python -m launch.evaluate --workdir=runs/quickstart
    python -m launch.evaluate --workdir=runs/quickstart --data=some/text.txt --noise_draws=8

The last line on standard output is a JSON object: for every part of the objective nats per token, bits per byte and per
character, and the Monte Carlo standard error. An autoregressive likelihood is exact, every other value an upper bound.
"""

import dataclasses

import jax

from diffusion_lm.build import LoadedModel, build_loss, load_for_inference, read_text
from diffusion_lm.data import loader
from diffusion_lm.evaluation.likelihood import held_out
from launch import command
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
WORKDIR = FLAGS.workdir()
DATA = FLAGS.string(
    "data", None, "Text: python-docs, python-source, a file, folder or glob. Default: the run's held-out documents."
)
NOISE_DRAWS = FLAGS.integer("noise_draws", 2, "Noise levels drawn for each batch; more lower the standard error.", 1)
BATCH_SIZE = FLAGS.integer("batch_size", 16, "Rows a batch.", 1)
CHECKPOINT_STEP = FLAGS.integer("checkpoint_step", None, "Step of the checkpoint to load. Default: the newest.", 0)


def main() -> dict:
    model = load_for_inference(WORKDIR.value, step=CHECKPOINT_STEP.value, allow_import=command.ALLOW_IMPORT.value)
    tokens = _tokens(model)
    loss = build_loss(model.config, model.network.module, model.process, bound=True)
    losses = jax.jit(lambda key, batch, params: loss(params, key, batch))
    estimates = held_out(
        lambda key, batch: losses(key, batch, model.network.params),
        loader.eval_batches(tokens, length=model.config.data.seq_len, batch=BATCH_SIZE.value),
        tokens,
        jax.random.key(0),
        draws=NOISE_DRAWS.value,
    )
    return {
        "objective": type(model.config.objective).__name__,
        "data": DATA.value or f"{model.config.data.path} (held out)",
        "tokens": tokens.targets,
        "bytes": tokens.bytes,
        "noise_draws": NOISE_DRAWS.value,
        "checkpoint_step": model.step,
        **{part: estimate._asdict() for part, estimate in estimates.items()},
    }


def _tokens(model: LoadedModel) -> loader.TokenArray:
    config = model.config
    if DATA.value is None:
        held = read_text(config, model.meta).valid
        if held is None:
            raise ValueError("the run held no text out (data.val_fraction=0): name a text with --data")
        return held
    corpus = dataclasses.replace(config.data, path=DATA.value).corpus()
    return loader.tokenize(corpus, model.tokenizer, pad=config.objective.layout.pad)


if __name__ == "__main__":
    command.run(main, FLAGS)
