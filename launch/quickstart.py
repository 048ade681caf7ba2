"""Trains configs/quickstart.py, then samples autoregressively and by diffusion, and reports quality and speed. Then
one network learns sudoku, and solves it from left to right and easiest cell first.

    python -m launch.quickstart

Checkpoints, metrics, a page and a picture of the canvas being denoised, and a picture of a sudoku being solved are kept
in --workdir; a second call resumes there. The last line on standard output is a JSON object with the tables' numbers.
"""

import sys
import time
from pathlib import Path

import jax

from diffusion_lm.build import build, load_for_inference
from diffusion_lm.config import load, override
from diffusion_lm.data import corpora, loader
from diffusion_lm.evaluation.compression import bits_per_byte
from diffusion_lm.evaluation.likelihood import held_out
from diffusion_lm.inference import pipeline, presets
from diffusion_lm.planning.pictures import GridHistory, decoding_order_picture
from diffusion_lm.planning.tasks.base import test_examples
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.training import loop
from diffusion_lm.visualize.page import write_page
from diffusion_lm.visualize.picture import denoising_picture
from diffusion_lm.visualize.terminal import play
from launch import command
from launch.flags import Flags

CONFIG, SUDOKU = (Path(__file__).parents[1] / "configs" / name for name in ("quickstart.py", "planning/quick.py"))
FLAGS = Flags(command.FLAGS)
WORKDIR = FLAGS.workdir(default="runs/quickstart")
SETTINGS = FLAGS.multi_string("set", [], "KEY=VALUE, as in train.steps=1000; may be repeated. Not of the sudoku part.")
BOARDS = FLAGS.integer("boards", 200, "Sudokus to solve; 0 leaves that part out.", 0)
MAX_NEW_TOKENS, DENOISING_STEPS, TEMPERATURE = 256, 12, 0.8
SUDOKU_STEPS = (16, 4)


def main() -> dict:
    started = time.perf_counter()
    config = override(load(str(CONFIG)), SETTINGS.value)
    run = build(config, WORKDIR.value)
    trained = loop.run(run.job, config.train, WORKDIR.value, run.checkpoints)
    if trained.interrupted:
        return {"steps": trained.steps, "interrupted": True, "checkpoint": str(trained.checkpoint)}
    model = load_for_inference(WORKDIR.value)
    quality, compressors = _quality(model, run.data.valid), _compressors(config)
    speed, output = _speed(model)
    trace = pipeline.trace(
        model, output, 0, max_new_tokens=MAX_NEW_TOKENS, title="256 tokens from masks in 12 denoising steps"
    )
    play(trace, stream=sys.stderr, seconds_per_frame=0.2)
    page, picture = Path(WORKDIR.value) / "canvas.html", Path(WORKDIR.value) / "canvas.svg"
    write_page(trace, page)
    denoising_picture(trace, picture)
    _print_table(quality, compressors, speed)
    sudoku = _sudoku(Path(WORKDIR.value) / "sudoku", BOARDS.value) if BOARDS.value else {}
    return {
        "steps": trained.steps,
        "train_seconds": round(trained.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "bits_per_byte": {part: round(e.bits_per_byte, 4) for part, e in quality.items()} | compressors,
        "standard_error_nats_per_token": {part: round(e.standard_error, 4) for part, e in quality.items()},
        **speed,
        "page": str(page),
        "picture": str(picture),
        **sudoku,
    }


def _quality(model, tokens: loader.TokenArray) -> dict:
    """The likelihood of held-out text: exact for the autoregressive part, an upper bound for the canvas part."""
    batches = loader.eval_batches(tokens, length=model.config.data.seq_len, batch=model.config.train.batch_size)
    return held_out(model.elbo(), batches, tokens, jax.random.key(1))


def _compressors(config) -> dict[str, float]:
    """Bits per byte of general-purpose compressors on the same held-out text."""
    data = config.data
    _, valid = corpora.split(data.corpus(), data.val_fraction)
    return {name: round(bits, 4) for name, bits in bits_per_byte("".join(valid.documents())).items()}


def _speed(model) -> tuple[dict, pipeline.GenerationOutput]:
    """Tokens per second of both samplers, without compilation and end of text; and a recorded generation."""
    draw = SamplingParams(temperature=TEMPERATURE, suppressed=model.tokenizer.suppressed)
    endless = SamplingParams(temperature=TEMPERATURE, suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))
    samplers = {
        "autoregressive": presets.autoregressive(model, sampling=endless),
        "canvas": presets.ancestral(
            model, sampling=endless, canvas_length=MAX_NEW_TOKENS, denoising_steps=DENOISING_STEPS
        ),
    }
    speed = {}
    for name, sampler in samplers.items():
        seconds = []
        for seed in range(4):
            start = time.perf_counter()
            output = pipeline.generate(model, sampler, [""], max_new_tokens=MAX_NEW_TOKENS, seed=seed)
            seconds.append(time.perf_counter() - start)
        speed[f"{name}_tokens_per_s"] = round(MAX_NEW_TOKENS / sorted(seconds[1:])[1], 1)
        speed[f"{name}_nfe"] = int(output.generation.nfe)
    shown = presets.ancestral(
        model, sampling=draw, canvas_length=MAX_NEW_TOKENS, denoising_steps=DENOISING_STEPS, record=True
    )
    return speed, pipeline.generate(model, shown, [""], max_new_tokens=MAX_NEW_TOKENS, seed=0)


def _print_table(quality, compressors, speed) -> None:
    rows = [
        ("autoregressive", quality["causal"].bits_per_byte, "autoregressive"),
        (f"diffusion, {MAX_NEW_TOKENS} tokens, {DENOISING_STEPS} steps", quality["canvas"].bits_per_byte, "canvas"),
    ]
    print(f"\n{'one network':34}{'bits per byte':>14}{'tokens/s':>10}{'NFE':>8}", file=sys.stderr)
    for name, bits, sampler in rows:
        tokens, nfe = speed[f"{sampler}_tokens_per_s"], speed[f"{sampler}_nfe"]
        print(f"{name:34}{bits:14.3f}{tokens:10.0f}{nfe:8d}", file=sys.stderr)
    for name, bits in compressors.items():
        print(f"{name + ', a general compressor':34}{bits:14.3f}", file=sys.stderr)


def _sudoku(workdir: Path, boards: int) -> dict:
    """Boards that training never saw, solved by one network from left to right and easiest cell first."""
    config = load(str(SUDOKU))
    run = build(config, workdir)
    if loop.run(run.job, config.train, workdir, run.checkpoints).interrupted:
        return {"sudoku": "interrupted"}
    model, task = load_for_inference(workdir), config.data.task
    tests = test_examples(task, seed=1, count=boards)
    prompts, length = [example.prompt for example in tests], task.max_lengths[1] + 1
    greedy = SamplingParams(temperature=0.0, suppressed=model.tokenizer.suppressed)
    samplers = {"left to right": presets.autoregressive(model, sampling=greedy)}
    for steps in SUDOKU_STEPS:
        canvas = {"canvas_length": 0, "denoising_steps": steps, "record": True}
        samplers[f"easiest first, {steps} passes"] = presets.confidence(model, sampling=greedy, **canvas)
    answers = {
        name: pipeline.generate(model, sampler, prompts, max_new_tokens=length, seed=0)
        for name, sampler in samplers.items()
    }
    solved = {name: sum(map(task.verify, prompts, answer.texts)) for name, answer in answers.items()}
    print(f"\n{'one network, ' + str(boards) + ' sudokus of 4 x 4':34}{'solved':>14}", file=sys.stderr)
    for name, count in solved.items():
        print(f"{name:34}{100 * count / boards:13.1f}%", file=sys.stderr)
    picture = workdir / "order.svg"
    _draw_hardest(model, task, tests, answers, picture)
    return {"sudoku": {"boards": boards, "solved": solved, "updates": config.train.steps, "picture": str(picture)}}


def _draw_hardest(model, task, tests, answers: dict, path: Path) -> None:
    """The board with the most blanks, as each way of reading fills it."""
    row = max(range(len(tests)), key=lambda i: task.difficulty(tests[i]))
    board, grids = tests[row], []
    for name, answer in answers.items():
        if answer.generation.history is None:  # a cell a pass, in order
            text = answer.texts[row].ljust(len(board.answer))[: len(board.answer)]
            frames = [list(text[:i]) + [""] * (len(text) - i) for i in range(1, len(text) + 1)]
        else:
            trace = pipeline.trace(model, answer, row, max_new_tokens=len(board.answer) + 1, title=name)
            start = len(answer.prompt_ids[row])
            frames = [frame.tokens[start : start + len(board.answer)] for frame in trace.frames[1:]]
        given = [digit != "0" for digit in board.prompt]
        grids.append(GridHistory(title=name, given=given, right=board.answer, frames=frames))
    decoding_order_picture(grids, path, columns=task.size, box=(2, task.size // 2), seconds_per_step=0.4)


if __name__ == "__main__":
    command.run(main, FLAGS)
