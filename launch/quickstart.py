"""One command from nothing to text: trains configs/quickstart.py, then writes both ways and says how well and how fast.

    python -m launch.quickstart

Everything is kept in --workdir: checkpoint, metrics, a page of the canvas clearing up, a picture of it. Started again
it goes on from there. The last line on standard output is a JSON object with the table's numbers.
"""

import sys
import time
from pathlib import Path

import jax
from absl import flags

from diffusion_lm.build import build, build_loss, load_for_inference
from diffusion_lm.config import load, override
from diffusion_lm.data import corpora, loader
from diffusion_lm.evaluation.compression import bits_per_byte
from diffusion_lm.evaluation.likelihood import held_out
from diffusion_lm.inference import presets
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.training import loop
from diffusion_lm.visualize.page import write_page
from diffusion_lm.visualize.plots import denoising_picture
from diffusion_lm.visualize.terminal import play
from launch import flags as launch_flags

CONFIG = Path(__file__).parents[1] / "configs/quickstart.py"
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder for what it makes.")
SETTINGS = flags.DEFINE_multi_string("set", [], "KEY=VALUE, as in train.steps=1000.")
LENGTH, PASSES, TEMPERATURE = 256, 12, 0.8


def main() -> dict:
    started = time.perf_counter()
    config = override(load(str(CONFIG)), SETTINGS.value)
    run = build(config, WORKDIR.value)
    trained = loop.run(run.job, config.train, WORKDIR.value, run.checkpoints)
    if trained.interrupted:
        return {"steps": trained.steps, "interrupted": True, "checkpoint": str(trained.checkpoint)}
    model = load_for_inference(WORKDIR.value)
    quality, scale = _quality(model, run.text.valid), _scale(config)
    speed, answer = _speed(model)
    trace = presets.trace(model, answer, 0, length=LENGTH, title="256 tokens out of noise in a dozen passes")
    play(trace, stream=sys.stderr, seconds_per_frame=0.2)
    page, picture = Path(WORKDIR.value) / "canvas.html", Path(WORKDIR.value) / "canvas.svg"
    write_page(trace, page)
    denoising_picture(trace, picture)
    _print_table(quality, scale, speed)
    return {
        "steps": trained.steps,
        "train_seconds": round(trained.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "bits_per_byte": {part: round(e.bits_per_byte, 4) for part, e in quality.items()} | scale,
        "standard_error_nats_per_token": {part: round(e.standard_error, 4) for part, e in quality.items()},
        **speed,
        "page": str(page),
        "picture": str(picture),
    }


def _quality(model, tokens: loader.TokenArray) -> dict:
    """Held-out text under both readings of the one network."""
    loss = build_loss(model.config, model.bound.module, model.process, bound=True)
    losses = jax.jit(lambda params, key, batch: loss(params, key, batch))
    batches = loader.eval_batches(tokens, length=model.config.data.seq_len, batch=model.config.train.batch_size)
    return held_out(lambda key, batch: losses(model.bound.params, key, batch), batches, tokens, jax.random.key(1))


def _scale(config) -> dict[str, float]:
    """General compressors on the same held-out text."""
    data = config.data
    _, valid = corpora.split(data.corpus(), data.val_fraction)
    return {name: round(bits, 4) for name, bits in bits_per_byte("".join(valid.documents())).items()}


def _speed(model) -> tuple[dict, presets.GenerationOutput]:
    """Tokens a second of both ways of writing, compilation apart, no end of text allowed; and a canvas to look at."""
    draw = SamplingParams(temperature=TEMPERATURE, suppressed=model.tokenizer.suppressed)
    whole = SamplingParams(temperature=TEMPERATURE, suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))
    ways = {
        "autoregressive": presets.autoregressive(model, draw=whole),
        "canvas": presets.ancestral(model, draw=whole, canvas=LENGTH, passes=PASSES),
    }
    speed = {}
    for name, writer in ways.items():
        seconds = []
        for seed in range(4):
            start = time.perf_counter()
            answer = presets.write(model, writer, [""], length=LENGTH, seed=seed)
            seconds.append(time.perf_counter() - start)
        speed[f"{name}_tokens_per_s"] = round(LENGTH / sorted(seconds[1:])[1], 1)
        speed[f"{name}_nfe"] = int(answer.generation.nfe)
    shown = presets.ancestral(model, draw=draw, canvas=LENGTH, passes=PASSES, record=True)
    return speed, presets.write(model, shown, [""], length=LENGTH, seed=0)


def _print_table(quality, scale, speed) -> None:
    rows = [
        ("token by token", quality["causal"].bits_per_byte, "autoregressive"),
        (f"{LENGTH} tokens in {PASSES} passes", quality["canvas"].bits_per_byte, "canvas"),
    ]
    print(f"\n{'one network':28}{'bits per byte':>14}{'tokens/s':>10}{'passes':>8}", file=sys.stderr)
    for name, bits, way in rows:
        tokens, nfe = speed[f"{way}_tokens_per_s"], speed[f"{way}_nfe"]
        print(f"{name:28}{bits:14.3f}{tokens:10.0f}{nfe:8d}", file=sys.stderr)
    for name, bits in scale.items():
        print(f"{name + ', for scale':28}{bits:14.3f}", file=sys.stderr)


if __name__ == "__main__":
    launch_flags.run(main)
