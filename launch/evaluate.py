"""What text costs a trained network, under the objective it was trained with.

    python -m launch.evaluate --workdir=runs/quickstart
    python -m launch.evaluate --workdir=runs/quickstart --data=some/text.txt --draws=8

Without --data: the held-out part of the text it was trained on. The last line on standard output is a JSON object:
for every part of the objective nats per token, bits per byte and per character, and the Monte Carlo standard error.
"""

import dataclasses

import jax
from absl import flags

from diffusion_lm.build import LoadedModel, build_loss, load_for_inference, read_text
from diffusion_lm.data import loader
from diffusion_lm.evaluation.likelihood import held_out
from launch import flags as launch_flags

WORKDIR = launch_flags.define_workdir()
DATA = flags.DEFINE_string("data", None, "python-docs, python-source, a file, folder or glob; none: what was held out.")
DRAWS = flags.DEFINE_integer("draws", 2, "Draws of noise a batch; more make the standard error smaller.")
BATCH = flags.DEFINE_integer("batch", 16, "Rows a batch.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; none: the newest.")


def main() -> dict:
    if BATCH.value < 1:
        raise ValueError(f"--batch must be at least 1, not {BATCH.value}")
    model = load_for_inference(WORKDIR.value, step=STEP.value, allow_import=launch_flags.ALLOW_IMPORT.value)
    tokens = _tokens(model)
    loss = build_loss(model.config, model.bound.module, model.process, bound=True)
    losses = jax.jit(lambda key, batch, params: loss(params, key, batch))
    estimates = held_out(
        lambda key, batch: losses(key, batch, model.bound.params),
        loader.eval_batches(tokens, length=model.config.data.seq_len, batch=BATCH.value),
        tokens,
        jax.random.key(0),
        draws=DRAWS.value,
    )
    return {
        "objective": type(model.config.objective).__name__,
        "data": DATA.value or f"{model.config.data.path} (held out)",
        "tokens": tokens.targets,
        "bytes": tokens.bytes,
        "draws": DRAWS.value,
        "step": model.step,
        **{part: estimate._asdict() for part, estimate in estimates.items()},
    }


def _tokens(model: LoadedModel) -> loader.TokenArray:
    config = model.config
    if DATA.value is None:
        held = read_text(config, model.meta).valid
        if held is None:
            raise ValueError("the run held nothing out (data.val_fraction=0): say which text with --data")
        return held
    corpus = dataclasses.replace(config.data, path=DATA.value).corpus()
    return loader.tokenize(corpus, model.tokenizer, pad=config.objective.layout.pad)


if __name__ == "__main__":
    launch_flags.run(main)
