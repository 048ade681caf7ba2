"""Generates text with a trained network, token by token or canvas by canvas.

    python -m launch.sample --workdir=runs/quickstart --prompt='Return the' --denoising_steps=12 --view=terminal
    python -m launch.sample --workdir=runs/quickstart --sampler=autoregressive --max_new_tokens=100 --num_samples=4
    python -m launch.sample --workdir=runs/quickstart --infill='Return the [[3-8]] of the list.' --canvas_length=32
    python -m launch.sample --workdir=runs/quickstart --prompt='Return the' --best_of=8 --best_of_score=elbo
    python -m launch.sample --workdir=runs/quickstart --prompts_file=prompts.txt --out=corpus.jsonl

The last line on standard output is a JSON object: texts with their prompts, tokens, forward passes (nfe) and seconds.
With --out=FILE.jsonl the texts go there instead, a record each, as `data.prompt_response` trains on them. The same
command continues a file that a kill cut short.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from diffusion_lm.build import LoadedModel, load_for_inference
from diffusion_lm.inference import best_of_n, pipeline, streaming
from diffusion_lm.inference.corpus import Asked, Shard, read_prompts, write_corpus
from diffusion_lm.inference.published import Preset
from diffusion_lm.samplers.base import Generation
from diffusion_lm.visualize.page import write_page, write_whole
from diffusion_lm.visualize.terminal import play
from launch import command, profiler, sampler_flags
from launch.flags import Flags

FLAGS = Flags(command.FLAGS, profiler.FLAGS, sampler_flags.FLAGS)
WORKDIR = FLAGS.workdir()
PROMPT = FLAGS.multi_string("prompt", [], "Text to continue; may be repeated, one row each. Default: a new document.")
PROMPTS_FILE = FLAGS.string(
    "prompts_file", None, "With --out=FILE.jsonl: prompts instead of --prompt. .jsonl: each record's prompt, or its "
    "messages without the last answer; other files: each line. Default: none.",
)  # fmt: skip
INFILL = FLAGS.multi_string(
    "infill", [], "Text with holes to fill in, instead of --prompt; may be repeated. [[5]]: 5 tokens are missing; "
    "[[2-8]]: 2 to 8, the most likely length is chosen.",
)  # fmt: skip
MAX_NEW_TOKENS = FLAGS.integer(
    "max_new_tokens", None, "Most tokens a text, at least 1; fewer where the text ends. The context bounds it, unless "
    "--rolling_context is set. Default: 256, or what a converted model's generation_config.json says.", 1,
)  # fmt: skip
CHAT = FLAGS.bool(
    "chat", False, "Each --prompt is what a user says, and the text is the answer, by the model's own chat template."
)
SYSTEM = FLAGS.string("system", None, "With --chat: the system message. Default: the template's own, if it has one.")
STOP = FLAGS.multi_string("stop", [], "A text ends before this string; may be repeated. Tokens and scores include it.")
ROLLING_CONTEXT = FLAGS.bool(
    "rolling_context", False, "Continues past the model's context: whenever it is full, its first half is dropped."
)
DROP_FINISHED = FLAGS.bool(
    "drop_finished", False, "Removes finished rows from the batch as it runs: faster for many long texts. Same texts."
)
SEED = FLAGS.integer(
    "seed", 0, "The same seed and prompt give the same text in any batch; not with --sampler=auto, which measures.",
    0, 2**32 - 1,
)  # fmt: skip
NUM_SAMPLES = FLAGS.integer("num_samples", 1, "Texts a prompt.", 1)
BEST_OF = FLAGS.integer("best_of", 0, "Samples this many texts a prompt, at least 2, and returns one. 0: off.", 0)
SCORES = {"likelihood": best_of_n.log_likelihood, "elbo": best_of_n.elbo}
BEST_OF_SCORE = FLAGS.enum(
    "best_of_score", "likelihood", [*SCORES, "vote"], "Which text --best_of returns. likelihood: the highest "
    "autoregressive log-likelihood a token; elbo: the highest bound a token; vote: the most frequent text.",
)  # fmt: skip
CHECKPOINT_STEP = FLAGS.integer("checkpoint_step", None, "Step of the checkpoint to load. Default: the newest.", 0)
VIEW = FLAGS.string("view", None, "terminal or FILE.html: shows the first row's canvas after each step. Default: off.")
STREAM = FLAGS.bool(
    "stream", False, "Prints the text on standard error as it is written: by token, round of drafts or canvas."
)
OUT = FLAGS.out(
    "File for the JSON result as well. FILE.jsonl: the texts, a record each, continued where there are some. "
    "Default: none."
)
NUM_SHARDS = FLAGS.integer(
    "num_shards", 1, "With --out=FILE.jsonl: parts of the rows, each for a process and in a file of its own, as in "
    "FILE-00000-of-00004.jsonl; in order they are the rows of one file.", 1,
)  # fmt: skip
SHARD_INDEX = FLAGS.integer("shard_index", None, "Which part this process writes: 0 to --num_shards - 1.", 0)
BATCH_SIZE = FLAGS.integer("batch_size", 32, "With --out=FILE.jsonl: texts that are generated together.", 1)
SECONDS_PER_FRAME = 0.15
HOLE = re.compile(r"\[\[(\d+)(?:-(\d+))?\]\]")


def main() -> dict:
    _check()
    out = OUT()
    if out is not None and out.suffix == ".jsonl":
        return _write_corpus(out)
    model = load_for_inference(WORKDIR.value, step=CHECKPOINT_STEP.value, allow_import=command.ALLOW_IMPORT.value)
    made = sampler_flags.preset(model, record=bool(VIEW.value))
    new_tokens = MAX_NEW_TOKENS.value or made.new_tokens(model, _asked(model, PROMPT.value or [""]))
    made = made._replace(max_new_tokens=new_tokens)
    sample = _infill if INFILL.value else _continue
    start = time.perf_counter()
    prompts, output, extra = sample(model, made)
    seconds = time.perf_counter() - start
    profiler.once_more(lambda: sample(model, made))
    if VIEW.value:
        _show(pipeline.trace(model, output, 0, max_new_tokens=new_tokens, title="step by step", subtitle=prompts[0]))
    result = {
        "texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, extra.pop("texts"), strict=True)],
        "tokens": [int(n) for n in output.generation.length],
        "nfe": int(output.generation.nfe),
        "sampler": sampler_flags.name(model),
        "checkpoint_step": model.step,
        "seed": SEED.value,
        "seconds_including_compilation": round(seconds, 3),
        **extra,
    }
    if out:
        write_whole(out, (json.dumps(result) + "\n").encode())
    return result


def _check() -> None:
    """Raises ValueError for flags that contradict each other, before anything is loaded."""
    sampler_flags.check()
    kind = sampler_flags.kind(sampler_flags.SAMPLER.value or "confidence")
    view, particles = VIEW.value, sampler_flags.NUM_PARTICLES.value
    corpus = (OUT() or Path()).suffix == ".jsonl"
    if view and view != "terminal" and not view.endswith(".html"):
        raise ValueError(f"--view is terminal or FILE.html; got {view}")
    if view and (not kind.records or particles or INFILL.value or ROLLING_CONTEXT.value):
        raise ValueError(
            "--view shows the steps of canvas samplers: not with --sampler=autoregressive, speculative or auto, "
            "--num_particles, --infill or --rolling_context"
        )
    if STREAM.value and (
        len(PROMPT.value) > 1 or NUM_SAMPLES.value > 1 or BEST_OF.value or particles or view or INFILL.value
        or ROLLING_CONTEXT.value or corpus
    ):  # fmt: skip
        raise ValueError(
            "--stream prints one text: it goes without a second --prompt, --num_samples, --best_of, --num_particles, "
            "--view, --infill, --rolling_context and --out=FILE.jsonl"
        )
    if BEST_OF.value and (BEST_OF.value < 2 or NUM_SAMPLES.value > 1 or view or particles):
        raise ValueError("--best_of is at least 2, and goes without --num_samples, --view and --num_particles")
    if BEST_OF_SCORE.value != "likelihood" and not BEST_OF.value:
        raise ValueError("--best_of_score goes with --best_of")
    if SYSTEM.value is not None and not CHAT.value:
        raise ValueError("--system goes with --chat")
    if CHAT.value and (not (PROMPT.value or PROMPTS_FILE.value) or INFILL.value):
        raise ValueError("--chat needs a --prompt (or --prompts_file), and goes without --infill")
    if PROMPTS_FILE.value and (PROMPT.value or not corpus):
        raise ValueError("--prompts_file goes with --out=FILE.jsonl, and without --prompt")
    if corpus and (view or INFILL.value or BEST_OF.value or particles):
        raise ValueError("--out=FILE.jsonl goes without --view, --infill, --best_of and --num_particles")
    shards, index = NUM_SHARDS.value, SHARD_INDEX.value
    if (shards > 1 and not corpus) or (shards > 1) != (index is not None):
        raise ValueError("--num_shards and --shard_index go together, with --out=FILE.jsonl")
    if index is not None and index >= shards:
        raise ValueError(f"--shard_index={index} is none of 0 to {shards - 1}, the parts of --num_shards={shards}")
    if any(not text for text in STOP.value):
        raise ValueError("--stop is a string of at least one character")
    others = (PROMPT.value, BEST_OF.value, ROLLING_CONTEXT.value, DROP_FINISHED.value, sampler_flags.CFG_SCALE.value)
    if INFILL.value and (any(others) or NUM_SAMPLES.value > 1 or STOP.value or particles):
        raise ValueError(
            "--infill goes without --prompt, --num_samples, --num_particles, --best_of, --rolling_context, "
            "--drop_finished, --stop and --cfg_scale"
        )


def _write_corpus(out: Path) -> dict:
    """Writes the texts as records."""
    prompts = [Asked(prompt=prompt) for prompt in PROMPT.value or [""]]
    asked = read_prompts(PROMPTS_FILE.value) if PROMPTS_FILE.value else prompts
    if CHAT.value:
        asked = [one if one.messages else Asked(messages=_messages(one.prompt)) for one in asked]
    model = load_for_inference(WORKDIR.value, step=CHECKPOINT_STEP.value, allow_import=command.ALLOW_IMPORT.value)
    made = sampler_flags.preset(model, record=False)
    if not MAX_NEW_TOKENS.value and made.max_new_tokens is None and made.max_length is not None:
        raise ValueError(f"generation_config.json says max_length={made.max_length}: set --max_new_tokens")
    made = made._replace(max_new_tokens=MAX_NEW_TOKENS.value or made.new_tokens(model, [""]))
    settings = {name: sampler_flags.FLAGS.values[name].value for name in sampler_flags.FLAGS.values}
    settings |= {"stop": STOP.value, "rolling_context": ROLLING_CONTEXT.value, "checkpoint_step": model.step}
    settings |= {"workdir": str(Path(WORKDIR.value).absolute()), "seed": SEED.value}
    start, shard = time.perf_counter(), Shard(SHARD_INDEX.value or 0, NUM_SHARDS.value)
    written = write_corpus(
        model, made.sampler, [one for one in asked for _ in range(NUM_SAMPLES.value)], out, settings=settings,
        batch_size=BATCH_SIZE.value, cut=lambda text: cut([text])[0], shard=shard, **_options(model, made),
    )  # fmt: skip
    return {
        **written._asdict(),
        "out": str(shard.path(out)),
        "sampler": sampler_flags.name(model),
        "checkpoint_step": model.step,
        "seed": SEED.value,
        "seconds_including_compilation": round(time.perf_counter() - start, 3),
    }


def _continue(model: LoadedModel, made: Preset) -> tuple[list[str], pipeline.GenerationOutput, dict]:
    """The prompts, one a text; the whole output; texts, and what else is reported."""
    sampler, options = made.sampler, _options(model, made)
    prompts = [prompt for prompt in PROMPT.value or [""] for _ in range(NUM_SAMPLES.value)]
    if BEST_OF.value and BEST_OF_SCORE.value != "vote":
        score = SCORES[BEST_OF_SCORE.value]
        chosen = best_of_n.best_of(model, sampler, _asked(model, prompts), BEST_OF.value, score=score, **options)
        return prompts, chosen.output, {"texts": cut(chosen.texts), "scores": chosen.scores.tolist()}
    each = BEST_OF.value or sampler_flags.NUM_PARTICLES.value or 1
    asked = [prompt for prompt in _asked(model, prompts) for _ in range(each)]
    if STREAM.value:
        return prompts, *_streamed(model, sampler, asked[0], options)
    output = pipeline.generate(model, sampler, asked, **options)
    texts = cut(output.texts)
    if BEST_OF.value:
        votes = [best_of_n.majority_vote(texts[i : i + each]) for i in range(0, len(texts), each)]
        return prompts, output, {"texts": [v.text for v in votes], "shares": [v.share for v in votes]}
    computed = output.generation.positions_computed  # of approximate caches
    extra = {} if computed is None else {"positions_computed": int(computed)}
    return prompts, output, {"texts": texts[::each], **extra}


def _options(model: LoadedModel, made: Preset) -> dict:
    return {
        "max_new_tokens": made.max_new_tokens,
        "seed": SEED.value,
        "logits_processor": sampler_flags.logits_processor(model),
        "cfg_scale": made.cfg_scale,
        "drop_finished": DROP_FINISHED.value,
        "rolling_context": ROLLING_CONTEXT.value,
    }


def _streamed(model: LoadedModel, sampler: Any, prompt, options: dict):
    """Prints the text as it is written; returns an output of the last pass, and the text."""
    del options["rolling_context"], options["drop_finished"]
    text = ""
    for piece, written in streaming.stream(model, sampler, prompt, stop=STOP.value, **options):
        text += piece
        generation = Generation(tokens=written.tokens[:1], length=written.length[:1], nfe=written.nfe, cache=None)
        print(piece, end="", flush=True, file=sys.stderr)
    print(file=sys.stderr, flush=True)
    return pipeline.GenerationOutput([text], generation, [], options["max_new_tokens"]), {"texts": [text]}


def _asked(model: LoadedModel, prompts: list[str]) -> list:
    """What the network continues: the prompts, or the ids of chats."""
    if not CHAT.value:
        return prompts
    if not hasattr(model.tokenizer, "encode_chat"):
        raise ValueError("--chat is for converted models with a chat template; this one was trained on plain text")
    return [model.tokenizer.encode_chat(_messages(prompt)) for prompt in prompts]


def _messages(prompt: str) -> list[dict[str, str]]:
    """A chat in which a user says this."""
    system = [] if SYSTEM.value is None else [{"role": "system", "content": SYSTEM.value}]
    return [*system, {"role": "user", "content": prompt}]


def cut(texts: list[str]) -> list[str]:
    """Each text up to the first of --stop."""
    return [text[: min((text.find(stop) for stop in STOP.value if stop in text), default=None)] for text in texts]


def _infill(model: LoadedModel, made: Preset) -> tuple[list[str], pipeline.GenerationOutput, dict]:
    """As `_continue`, for texts with holes."""
    texts, rule = [_parts(text) for text in INFILL.value], sampler_flags.logits_processor(model)
    sampler = made.sampler
    if made.cfg_scale:
        raise ValueError(f"infilling goes without guidance, and generation_config.json sets cfg_scale={made.cfg_scale}")
    if not any(isinstance(part, range) for parts in texts for part in parts):
        output = pipeline.infill(model, sampler, texts, seed=SEED.value, logits_processor=rule)
        return INFILL.value, output, {"texts": _whole(texts, output.texts)}
    if len(texts) > 1:
        raise ValueError("--infill with a hole of several lengths takes one text at a time")
    score = best_of_n.log_likelihood if model.config.objective.trains_ar else best_of_n.elbo
    chosen = best_of_n.infill_best(model, sampler, texts[0], score=score, seed=SEED.value, logits_processor=rule)
    return INFILL.value, chosen.output, {"texts": _whole(texts, chosen.texts), "scores": chosen.scores.tolist()}


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


def _whole(texts: list[list], continuations: list[str]) -> list[str]:
    """Each text's first string and its continuation, holes filled."""
    return [
        (parts[0] if isinstance(parts[0], str) else "") + rest for parts, rest in zip(texts, continuations, strict=True)
    ]


def _show(trace) -> None:
    if VIEW.value == "terminal":
        play(trace, stream=sys.stderr, seconds_per_frame=SECONDS_PER_FRAME)
    else:
        write_page(trace, VIEW.value)


if __name__ == "__main__":
    command.run(main, FLAGS)
