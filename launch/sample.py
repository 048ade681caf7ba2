"""Writes text with a trained network, token by token or canvas by canvas.

    python -m launch.sample --workdir=runs/quickstart --prompt='Return the' --passes=12 --view=terminal
    python -m launch.sample --workdir=runs/quickstart --sampler=autoregressive --length=100 --samples=4

The texts and how they were made are the last line on standard output, a JSON object; --out writes it to a file too.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags

from diffusion_lm import generate
from diffusion_lm.build import load_for_inference
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.samplers.pace import EntropyBound, Even, Factor, Threshold
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Loop, Rescale
from diffusion_lm.visualize.page import write_page, write_whole
from diffusion_lm.visualize.terminal import play
from launch import flags as launch_flags

WORKDIR = launch_flags.define_workdir()
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to go on from; given again, another row. None: a new document.")
PACES = {  # of the confidence sampler, by the dial
    "confidence": lambda dial: Even(),
    "margin": lambda dial: Even(measure="margin"),
    "entropy": lambda dial: Even(measure="entropy"),
    "threshold": lambda dial: Threshold() if dial is None else Threshold(least=dial),
    "factor": lambda dial: Factor() if dial is None else Factor(factor=dial),
    "entropy_bound": lambda dial: EntropyBound() if dial is None else EntropyBound(bound=dial),
}
REMASKS = {  # what takes tokens back, by the dial
    "remask_cap": lambda dial: Cap() if dial is None else Cap(eta=dial),
    "remask_rescale": lambda dial: Rescale() if dial is None else Rescale(eta=dial),
    "remask_confidence": lambda dial: ConfidenceBased(),
    "remask_loop": lambda dial: Loop() if dial is None else Loop(eta=dial),
}
TOKENWISE = ("autoregressive", "speculative")
FREE = ("threshold", "factor", "entropy_bound")  # take as many passes as they need
DIALED = (*FREE, "remask_cap", "remask_rescale", "remask_loop")
KINDS = [*PACES, "ancestral", *REMASKS, *TOKENWISE, "auto"]
SAMPLER = flags.DEFINE_enum("sampler", "confidence", KINDS, "How to write.")
DIAL = flags.DEFINE_float(
    "dial", None, "What threshold (0.9), factor (1), entropy_bound (0.1 nats) and remask_* (share a pass, 0.02) go by."
)
CORRECT = flags.DEFINE_integer("correct", 0, "So many of ancestral's --passes correct; for noise that isn't masks.")
ROUNDS = flags.DEFINE_integer("rounds", 0, "Rounds of second thoughts on each full canvas, a --span each.")
SPAN = flags.DEFINE_integer("span", 4, "Tokens that a round writes again.")
LENGTH = flags.DEFINE_integer("length", 256, "Most tokens to write; fewer if the text ends or the context is full.")
CANVAS = flags.DEFINE_integer("canvas", 0, "Tokens cleared together; 0: as in training.")
PASSES = flags.DEFINE_integer("passes", None, "Most passes a canvas; none: 12, or what a dial takes.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Keep so many of the likeliest tokens; 0: all.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Keep tokens with at least this share of the likeliest one's probability.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the smallest set of tokens with this much probability.")
SEED = flags.DEFINE_integer("seed", 0, "The same seed and prompt give the same text.")
SAMPLES = flags.DEFINE_integer("samples", 1, "Texts a prompt.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; none: the newest.")
OUT = flags.DEFINE_string("out", None, "File for the JSON object.")
VIEW = flags.DEFINE_string("view", None, "terminal, or FILE.html: watch the first row's canvas clear up.")
SECONDS_PER_FRAME = 0.15


def main() -> dict:
    _check()
    model = load_for_inference(WORKDIR.value, step=STEP.value)
    writer = _writer(model)
    prompts = [prompt for prompt in PROMPT.value or [""] for _ in range(SAMPLES.value)]
    start = time.perf_counter()
    answer = generate.write(model, writer, prompts, length=LENGTH.value, seed=SEED.value)
    seconds = time.perf_counter() - start
    if VIEW.value:
        _show(generate.story(model, answer, 0, length=LENGTH.value, title="canvas by canvas", subtitle=prompts[0]))
    results = {
        "texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, answer.texts, strict=True)],
        "tokens": [int(n) for n in answer.generation.length],
        "nfe": int(answer.generation.nfe),
        "sampler": SAMPLER.value,
        "step": model.step,
        "seed": SEED.value,
        "seconds_with_compilation": round(seconds, 3),
    }
    if OUT.value:
        write_whole(OUT.value, (json.dumps(results) + "\n").encode())
    return results


def _check() -> None:
    """What can be said before anything is loaded."""
    if SAMPLES.value < 1:
        raise ValueError(f"--samples must be at least 1, not {SAMPLES.value}")
    if PASSES.value is not None and PASSES.value < 1:
        raise ValueError(f"--passes must be at least 1, not {PASSES.value}")
    if DIAL.value is not None and SAMPLER.value not in DIALED:
        raise ValueError(f"--dial is for --sampler={', '.join(DIALED)}; {SAMPLER.value} goes by --passes")
    if CANVAS.value < 0:
        raise ValueError(f"--canvas must be at least 1 (or 0: as in training), not {CANVAS.value}")
    if not 0 <= SEED.value < 2**32:
        raise ValueError(f"--seed must lie in [0, 2**32), not {SEED.value}")
    if ROUNDS.value and SAMPLER.value in (*TOKENWISE, "auto"):
        raise ValueError(f"--rounds go over canvases, {SAMPLER.value} can't: use another --sampler")
    if CORRECT.value and SAMPLER.value != "ancestral":
        raise ValueError(f"--correct is for --sampler=ancestral, not {SAMPLER.value}")
    if VIEW.value and VIEW.value != "terminal" and Path(VIEW.value).suffix != ".html":
        raise ValueError(f"--view takes terminal or a FILE.html, not {VIEW.value}")
    if VIEW.value and SAMPLER.value in (*TOKENWISE, "auto"):
        raise ValueError(f"--view shows canvases, and {SAMPLER.value} records none: use another --sampler")


def _writer(model):
    kept = {"top_k": TOP_K.value, "top_p": TOP_P.value, "min_p": MIN_P.value}
    draw = Draw(temperature=TEMPERATURE.value, suppressed=model.tokenizer.suppressed, **kept)
    if SAMPLER.value in TOKENWISE:
        return getattr(generate, SAMPLER.value)(model, draw=draw)
    passes = 12 if PASSES.value is None and SAMPLER.value not in FREE else PASSES.value
    if SAMPLER.value == "auto":
        return generate.auto(model, draw=draw, canvas=CANVAS.value, passes=passes)
    rest = {"draw": draw, "canvas": CANVAS.value, "passes": passes, "record": bool(VIEW.value)}
    if SAMPLER.value == "ancestral":
        writer = generate.ancestral(model, correct=CORRECT.value, **rest)
    elif SAMPLER.value in REMASKS:
        writer = generate.remasking(model, remask=REMASKS[SAMPLER.value](DIAL.value), **rest)
    else:
        writer = generate.confidence(model, pace=PACES[SAMPLER.value](DIAL.value), **rest)
    return generate.revised(model, writer, rounds=ROUNDS.value, span=SPAN.value) if ROUNDS.value else writer


def _show(story) -> None:
    if VIEW.value == "terminal":
        play(story, stream=sys.stderr, seconds_per_frame=SECONDS_PER_FRAME)
    else:
        write_page(story, VIEW.value)


if __name__ == "__main__":
    launch_flags.run(main)
