"""Evaluates a trained network's likelihood of text, under the objective that it was trained with.

    python -m launch.evaluate --workdir=runs/quickstart
    python -m launch.evaluate --workdir=runs/quickstart --data=some/text.txt --noise_draws=8

The last line on standard output is a JSON object: for every part of the objective nats per token, bits per byte and per
character, and the Monte Carlo standard error. An autoregressive likelihood is exact, every other value an upper bound.
"""

from diffusion_lm.inference import api
from launch import command
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
WORKDIR = FLAGS.workdir()
DATA = FLAGS.string(
    "data", None, "Text: python-docs, python-source, a file, folder or glob. Default: the run's held-out documents."
)
NOISE_DRAWS = FLAGS.integer("noise_draws", 2, "Noise levels drawn for each batch; more lower the standard error.", 1)
BATCH_SIZE = FLAGS.integer("batch_size", 16, "Rows a batch.", 1)
SEQ_LEN = FLAGS.integer(
    "seq_len", None, "Positions a row. Default: the network's context, which of a converted model is long: set 512.", 2
)
CHECKPOINT_STEP = FLAGS.integer("checkpoint_step", None, "Step of the checkpoint to load. Default: the newest.", 0)


def main() -> dict:
    model = api.load(WORKDIR.value, CHECKPOINT_STEP.value, command.ALLOW_IMPORT.value)
    found = api.evaluate(model, DATA.value, draws=NOISE_DRAWS.value, batch_size=BATCH_SIZE.value, seq_len=SEQ_LEN.value)
    return {
        "objective": type(model.config.objective).__name__,
        "data": DATA.value or f"{model.config.data.path} (held out)",
        "tokens": found.tokens,
        "bytes": found.bytes,
        "seq_len": SEQ_LEN.value or model.config.data.seq_len,
        "noise_draws": NOISE_DRAWS.value,
        "checkpoint_step": model.step,
        **{part: estimate._asdict() for part, estimate in found.parts.items()},
    }


if __name__ == "__main__":
    command.run(main, FLAGS)
