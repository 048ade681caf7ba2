"""Evaluates a trained network's likelihood of text, under the objective that it was trained with.

    python -m launch.evaluate --workdir=runs/quickstart
    python -m launch.evaluate --workdir=runs/quickstart --data=some/text.txt --noise_draws=8
    python -m launch.evaluate --workdir=runs/quickstart --data=some/text.txt --documents=out.jsonl

The last line on standard output is a JSON object: for every part of the objective nats per token, bits per byte and per
character, and the Monte Carlo standard error. An autoregressive likelihood is exact, every other value an upper bound.
"""

import json
import math
from pathlib import Path

from diffusion_lm.data.tokenizer import Tokenizer, spelled
from diffusion_lm.inference import api
from diffusion_lm.visualize.page import write_whole
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
DOCUMENTS = FLAGS.string(
    "documents",
    None,
    "With --data: JSON Lines file for the likelihood of each of its documents and, where it is exact, of their "
    "tokens. Default: none.",
)
CHECKPOINT_STEP = FLAGS.integer("checkpoint_step", None, "Step of the checkpoint to load. Default: the newest.", 0)


def main() -> dict:
    if DOCUMENTS.value is not None:
        if DATA.value is None:
            raise ValueError("--documents goes with --data")
        if not Path(DOCUMENTS.value).absolute().parent.is_dir():
            raise FileNotFoundError(f"--documents={DOCUMENTS.value}: its folder doesn't exist")
    model = api.load(WORKDIR.value, CHECKPOINT_STEP.value, command.ALLOW_IMPORT.value)
    shape = {"draws": NOISE_DRAWS.value, "batch_size": BATCH_SIZE.value, "seq_len": SEQ_LEN.value}
    found = api.evaluate(model, DATA.value, **shape)
    if DOCUMENTS.value is not None:
        texts = [t for t in api.documents(model, DATA.value).documents() if len(model.tokenizer.encode(t))]
        lines = _lines(model.tokenizer, texts, api.log_likelihood(model, texts, **shape))
        write_whole(DOCUMENTS.value, lines.encode())
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


def _lines(tokenizer: Tokenizer, texts: list[str], found: api.LogLikelihood) -> str:
    """A JSON object for each text, in their order; bytes are those of the text that was scored."""
    lines = []
    for number, text in enumerate(texts):
        nats, tokens = -float(found.values[number]), int(found.num_tokens[number])
        size = len(spelled(tokenizer, text, tokenizer.encode(text)).encode())
        line = {
            "document": number,
            "log_likelihood": -nats,
            "standard_error": float(found.standard_errors[number]),
            "exact": found.exact,
            "tokens": tokens,
            "bytes": size,
            "nats_per_token": nats / tokens,
            "bits_per_byte": nats / size / math.log(2) if size else None,
            "start": text[:40],
        }
        if found.exact:
            line["token_log_likelihoods"] = [round(float(value), 6) for value in found.token_values[number]]
        lines.append(f"{json.dumps(line)}\n")
    return "".join(lines)


if __name__ == "__main__":
    command.run(main, FLAGS)
