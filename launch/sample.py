"""Writes text with a trained network, token by token or canvas by canvas.

    python -m launch.sample --workdir=runs/quickstart --prompt='Return the' --passes=12 --view=terminal
    python -m launch.sample --workdir=runs/quickstart --sampler=autoregressive --length=100 --samples=4
    python -m launch.sample --workdir=runs/quickstart --infill='Return the [[3-8]] of the list.' --canvas=32
    python -m launch.sample --workdir=runs/quickstart --prompt='Return the' --best_of=8 --score=causal

The texts and how they were made are the last line on standard output, a JSON object; --out writes it to a file too.
--profile=FOLDER writes all once more, traced.
"""

import json
import re
import sys
import time
from pathlib import Path

from absl import flags

from diffusion_lm.build import LoadedModel, load_for_inference
from diffusion_lm.inference import best_of_n, presets
from diffusion_lm.visualize.page import write_page, write_whole
from diffusion_lm.visualize.terminal import play
from launch import flags as launch_flags
from launch import profiler, sampler_flags

WORKDIR = launch_flags.define_workdir()
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to go on from; given again, another row. None: a new document.")
INFILL = flags.DEFINE_multi_string(
    "infill", [], "Text to fill in, instead of --prompt: [[5]] is a hole of 5 tokens, [[2-8]] of whichever is best."
)
LENGTH = flags.DEFINE_integer("length", 256, "Most tokens to write; fewer if the text ends or the context is full.")
SLIDE = flags.DEFINE_bool("slide", False, "Where the context is full, forget its first half and go on.")
COMPACT = flags.DEFINE_bool("compact", False, "Texts that end leave the batch: for many and long ones.")
SEED = flags.DEFINE_integer("seed", 0, "The same seed and prompt give the same text (but auto's choice is measured).")
SAMPLES = flags.DEFINE_integer("samples", 1, "Texts a prompt.")
BEST_OF = flags.DEFINE_integer("best_of", 0, "Write so many texts a prompt and keep one, by --score.")
SCORES = {"causal": best_of_n.by_causal, "bound": best_of_n.by_bound}
SCORE = flags.DEFINE_enum("score", "causal", [*SCORES, "vote"], "What is best: the likeliest, or what most texts are.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; none: the newest.")
OUT = flags.DEFINE_string("out", None, "File for the JSON object.")
VIEW = flags.DEFINE_string("view", None, "terminal, or FILE.html: watch the first row's canvas clear up.")
SECONDS_PER_FRAME = 0.15
HOLE = re.compile(r"\[\[(\d+)(?:-(\d+))?\]\]")


def main() -> dict:
    _check()
    model = load_for_inference(WORKDIR.value, step=STEP.value, allow_import=launch_flags.ALLOW_IMPORT.value)
    writer = sampler_flags.writer(model, record=bool(VIEW.value))
    write = _filled if INFILL.value else _written
    start = time.perf_counter()
    prompts, answer, more = write(model, writer)
    seconds = time.perf_counter() - start
    profiler.once_more(lambda: write(model, writer))
    if VIEW.value:
        _show(presets.trace(model, answer, 0, length=LENGTH.value, title="canvas by canvas", subtitle=prompts[0]))
    results = {
        "texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, more.pop("texts"), strict=True)],
        "tokens": [int(n) for n in answer.generation.length],
        "nfe": int(answer.generation.nfe),
        "sampler": sampler_flags.SAMPLER.value,
        "step": model.step,
        "seed": SEED.value,
        "seconds_with_compilation": round(seconds, 3),
        **more,
    }
    if OUT.value:
        write_whole(OUT.value, (json.dumps(results) + "\n").encode())
    return results


def _check() -> None:
    """What can be said before anything is loaded."""
    sampler_flags.check()
    if SAMPLES.value < 1:
        raise ValueError(f"--samples must be at least 1, not {SAMPLES.value}")
    if not 0 <= SEED.value < 2**32:
        raise ValueError(f"--seed must lie in [0, 2**32), not {SEED.value}")
    if VIEW.value and VIEW.value != "terminal" and Path(VIEW.value).suffix != ".html":
        raise ValueError(f"--view takes terminal or a FILE.html, not {VIEW.value}")
    if VIEW.value and (
        sampler_flags.SAMPLER.value in (*sampler_flags.TOKENWISE, "auto")
        or sampler_flags.PARTICLES.value
        or INFILL.value
    ):
        raise ValueError("--view shows canvases as they are written behind a prompt: use another --sampler")
    if BEST_OF.value and (BEST_OF.value < 2 or SAMPLES.value > 1 or VIEW.value or sampler_flags.PARTICLES.value):
        raise ValueError("--best_of takes 2 or more, without --samples, --view and --particles")
    if INFILL.value and (
        PROMPT.value or BEST_OF.value or SLIDE.value or sampler_flags.GUIDANCE.value or SAMPLES.value > 1
    ):
        raise ValueError("--infill goes without --prompt, --samples, --best_of, --slide and --guidance")


def _written(model: LoadedModel, writer) -> tuple[list[str], presets.GenerationOutput, dict]:
    """Prompts, one a text; all answers; the texts, and what else there is to say."""
    asked = {"length": LENGTH.value, "seed": SEED.value, "constraint": sampler_flags.constraint(model)}
    asked |= {"guidance": sampler_flags.GUIDANCE.value, "compact": COMPACT.value, "slide": SLIDE.value}
    prompts = [prompt for prompt in PROMPT.value or [""] for _ in range(SAMPLES.value)]
    if not BEST_OF.value:
        each = sampler_flags.PARTICLES.value or 1
        answer = presets.write(model, writer, [p for p in prompts for _ in range(each)], **asked)
        read = getattr(answer.generation, "read", None)  # of approximate caches
        read = {} if read is None else {"positions_read": int(read)}
        return prompts, answer, {"texts": answer.texts[::each], **read}
    if SCORE.value == "vote":
        answer = presets.write(model, writer, [p for p in prompts for _ in range(BEST_OF.value)], **asked)
        parts = [answer.texts[i : i + BEST_OF.value] for i in range(0, len(answer.texts), BEST_OF.value)]
        votes = [best_of_n.majority_vote(texts) for texts in parts]
        return prompts, answer, {"texts": [v.text for v in votes], "shares": [v.share for v in votes]}
    chosen = best_of_n.best_of(model, writer, prompts, BEST_OF.value, score=SCORES[SCORE.value], **asked)
    return prompts, chosen.answer, {"texts": chosen.texts, "scores": chosen.scores.tolist()}


def _filled(model: LoadedModel, writer) -> tuple[list[str], presets.GenerationOutput, dict]:
    """As `_written`, for texts with holes."""
    texts, rule = [_parts(text) for text in INFILL.value], sampler_flags.constraint(model)
    if not any(isinstance(part, range) for parts in texts for part in parts):
        answer = presets.infill(model, writer, texts, seed=SEED.value, constraint=rule)
        return INFILL.value, answer, {"texts": _whole(texts, answer.texts)}
    if len(texts) > 1:
        raise ValueError("--infill with a hole of several lengths fills in one text at a time")
    score = best_of_n.by_causal if model.config.objective.trains_ar else best_of_n.by_bound
    chosen = best_of_n.infill_best(model, writer, texts[0], score=score, seed=SEED.value, constraint=rule)
    return INFILL.value, chosen.answer, {"texts": _whole(texts, chosen.texts), "scores": chosen.scores.tolist()}


def _parts(text: str) -> list[str | int | range]:
    """'a [[2]] b [[3-5]]' -> ['a ', 2, ' b ', range(3, 6)]."""
    parts, at = [], 0
    for hole in HOLE.finditer(text):
        least, most = int(hole[1]), int(hole[2] or hole[1])
        if not 1 <= least <= most:
            raise ValueError(f"--infill: {hole[0]} is no hole; write [[3]] or [[2-8]]")
        parts += [text[at : hole.start()]] if hole.start() > at else []
        parts.append(least if hole[2] is None else range(least, most + 1))
        at = hole.end()
    if not parts:
        raise ValueError(f"--infill={text} has no hole: write [[5]] where 5 tokens are missing")
    return [*parts, text[at:]] if at < len(text) else parts


def _whole(texts: list[list], filled: list[str]) -> list[str]:
    """What was filled in behind each text's first string, and that string."""
    return [(parts[0] if isinstance(parts[0], str) else "") + rest for parts, rest in zip(texts, filled, strict=True)]


def _show(trace) -> None:
    if VIEW.value == "terminal":
        play(trace, stream=sys.stderr, seconds_per_frame=SECONDS_PER_FRAME)
    else:
        write_page(trace, VIEW.value)


if __name__ == "__main__":
    launch_flags.run(main)
