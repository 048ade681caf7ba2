"""Compares kinds of models trained on the same text with the same network, optimizer and number of updates.

    python -m launch.compare --data=input.txt --budget=10 --workdir=runs/compare --out=runs/compare

A kind is one of configs/tinyshakespeare.py, with settings of its own after colons: mixture:process.uniform=0.2. All
kinds make the same number of updates: as many as fit --budget minutes a kind on average, by the speed of their first
updates. `ar` is trained first, since it judges the samples of the others. A student (distilled...) is trained after its
teacher, the kind with the same network, noise and objective; its speed isn't measured beforehand. A second call resumes
where the first stopped. A kind that fails keeps its row, with the reason. The results are table.md, figure.png (or
--figure=svg) and a JSON object, the last line on standard output.
"""

import functools
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from diffusion_lm import lock
from diffusion_lm.build import LoadedModel, build, load_for_inference, read_text
from diffusion_lm.config import Config, load, override
from diffusion_lm.data import loader
from diffusion_lm.evaluation.generation_quality import judged, quality
from diffusion_lm.evaluation.likelihood import held_out
from diffusion_lm.inference import pipeline, presets
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.training import loop
from diffusion_lm.visualize.page import write_whole
from diffusion_lm.visualize.plots import curve
from launch import command
from launch.benchmarks.timing import updates
from launch.flags import Flags

CONFIG = Path(__file__).parents[1] / "configs/tinyshakespeare.py"
FLAGS = Flags(command.FLAGS)
DATA = FLAGS.string("data", None, "Text: a file, folder or glob.", required=True)
ALL = "ar,masked,uniform,mixture,score,flow,embedding,joint,joint_uniform"
KINDS = FLAGS.list("kinds", ALL, "Kinds to train, `ar` among them; or KIND:KEY=VALUE.")
BUDGET = FLAGS.float("budget", 10.0, "Minutes of training a kind on average, above 0.", 0)
WORKDIR = FLAGS.workdir()
OUT = FLAGS.string("out", None, "Folder for the table and the figure. Default: the workdir.")
FIGURE = FLAGS.enum("figure", "png", ["png", "svg"], "The figure's file format.")
SEED = FLAGS.integer("seed", 0, "Seed of parameters, data order, noise and sampling.", 0, 2**32 - 1)
NUM_SAMPLES = FLAGS.integer("num_samples", 128, "Texts sampled at each number of denoising steps.", 2)
DENOISING_STEPS = FLAGS.list("denoising_steps", "1,2,4,8,16,64", "Numbers of denoising steps a canvas to sample with.")
SETTINGS = FLAGS.multi_string("set", [], "KEY=VALUE for every kind, as in model.width=256; may be repeated.")
# Tokens a row, which blocks of 16 divide: begin of text and 15 held-out characters, then what is sampled.
PROMPT_LENGTH, NEW_TOKENS = 16, 64


def main() -> dict:
    started, home = time.perf_counter(), Path(WORKDIR.value)
    command.needs("matplotlib", "viz", "the figure")
    kinds, records = _kinds(), {}
    home.mkdir(parents=True, exist_ok=True)
    with lock.hold(home / lock.NAME):
        plan = _plan(home, kinds)
        for kind in kinds:
            record = records[kind] = Record(home / kind / "record.json")
            config = _config(kind, plan["steps"])
            if teacher := _teacher(kind, kinds):
                config = override(config, [f"objective.teacher={home / teacher}"])
                if "failed" in records[teacher]:
                    record.keep(failed=f"its teacher, {teacher}, failed")
            if not _train(kind, config, home / kind, record):
                return {"interrupted": kind, **plan}
            if "failed" not in record:
                model, judge = load_for_inference(home / kind), load_for_inference(home / "ar")
                _score(model, record)
                _sample(model, judge, record)
        out, lines = Path(OUT.value or home), rows(records)
        out.mkdir(parents=True, exist_ok=True)
        table, figure = out / "table.md", out / f"figure.{FIGURE.value}"
        write_whole(table, markdown(lines).encode())
        draw(lines, figure)
        seconds = round(time.perf_counter() - started, 1)
        return {**plan, "rows": lines, "table": str(table), "figure": str(figure), "seconds": seconds}


def _kinds() -> list[str]:
    """ar first, students after their teachers."""
    kinds = list(dict.fromkeys(KINDS.value))
    for check in (step_counts, *(functools.partial(_teacher, kind, kinds) for kind in kinds)):
        check()  # every error is reported before the first update
    kinds.sort(key=lambda kind: (kind != "ar", _is_student(_config(kind))))
    if kinds[:1] != ["ar"]:
        raise ValueError("--kinds needs ar among them, since it judges the samples of the others")
    if not BUDGET.value > 0:
        raise ValueError(f"--budget must be above 0; got {BUDGET.value}")
    return kinds


def step_counts() -> list[int]:
    """The numbers of --denoising_steps. Raises ValueError if one isn't a positive integer."""
    if not all(n.isdecimal() and int(n) for n in DENOISING_STEPS.value):
        raise ValueError(
            f"--denoising_steps takes positive integers, as in 1,4,16; got {','.join(DENOISING_STEPS.value)}"
        )
    return [int(n) for n in DENOISING_STEPS.value]


def _config(kind: str, steps: int = 20) -> Config:
    """The kind's config, on rows of one length."""
    kind, *own = kind.split(":")
    fixed = [
        f"data.path={DATA.value}",
        f"data.seq_len={PROMPT_LENGTH + NEW_TOKENS}",
        f"train.steps={steps}",
        "train.eval_every=0",
        "train.eval_batches=1",
    ]
    return override(load(f"{CONFIG}:{kind}"), [*fixed, f"seed={SEED.value}", *SETTINGS.value, *own])


def _is_student(config: Config) -> bool:
    return isinstance(config.objective, Distillation)


def _teacher(kind: str, kinds: list[str]) -> str | None:
    """The kind that a student is distilled from; None for other kinds. Raises ValueError if it isn't among them."""
    asked = _config(kind)
    if not _is_student(asked):
        return None
    wanted = (asked.model, asked.process, asked.objective.objective)
    for other in kinds:
        found = _config(other)
        if (found.model, found.process, found.objective) == wanted:
            return other
    raise ValueError(f"--kinds: {kind} needs a teacher among them with the same network, noise and objective")


class Record(dict):
    """Results of a kind so far, kept in a JSON file."""

    def __init__(self, path: Path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self._path = path

    def keep(self, **found) -> None:
        self.update(found)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self, indent=1).encode())


def _plan(home: Path, kinds: list[str]) -> dict:
    """The number of updates of each kind: chosen once, by measuring each kind's speed, and kept."""
    asked = {"data": DATA.value, "budget_minutes": BUDGET.value, "seed": SEED.value, "settings": list(SETTINGS.value)}
    plan = Record(home / "plan.json")
    if any(plan.get(name, value) != value for name, value in asked.items()):
        was = {name: plan[name] for name in asked}
        raise ValueError(f"--workdir={home} holds another comparison, {json.dumps(was)}: use a new one")
    if "steps" not in plan:
        configs = {kind: _config(kind) for kind in kinds}
        slow = {kind: _seconds_per_update(c) for kind, c in configs.items() if not _is_student(c)}
        fit = 60 * BUDGET.value * len(slow) / sum(slow.values())
        plan.keep(**asked, steps=max(10, int(fit) // 10 * 10), seconds_per_update=slow)
    return dict(plan)


def _seconds_per_update(config: Config) -> float:
    with tempfile.TemporaryDirectory() as nowhere:
        return updates(build(config, nowhere).job)[1]


def _train(kind: str, config: Config, home: Path, record: Record) -> bool:
    """Trains a kind; False if it was interrupted."""
    if "steps" in record or "failed" in record:
        return True
    run = build(config, home)
    try:
        done = loop.run(run.job, config.train, home, run.checkpoints)
    except loop.NonFiniteError as error:
        if kind == "ar":
            raise  # without it there is no judge
        record.keep(failed=str(error))
        return True
    if not done.interrupted:
        record.keep(steps=config.train.steps, tokens_per_s=done.tokens_per_s, train_seconds=done.seconds)
    return not done.interrupted


def _score(model: LoadedModel, record: Record) -> None:
    """Bits per byte of held-out text, for each part of the objective."""
    if "bits_per_byte" in record:
        return
    text, config = read_text(model.config, model.meta).valid, model.config
    batches = loader.eval_batches(text, length=config.data.seq_len, batch=64)
    found = held_out(model.elbo(), batches, text, jax.random.key(SEED.value))
    errors = {part: e.standard_error * e.bits_per_byte / e.nats_per_token for part, e in found.items()}
    record.keep(bits_per_byte={part: e.bits_per_byte for part, e in found.items()}, standard_error=errors)


def _sample(model: LoadedModel, judge: LoadedModel, record: Record) -> None:
    """Samples of each part of the objective at each number of denoising steps, judged; and the held-out text itself."""
    texts, done = _held_out_rows(judge), record.get("samples", {})
    prompts = [model.tokenizer.decode(row[1:PROMPT_LENGTH]) for row in texts]
    endless = SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))  # all of one length
    for part in record["bits_per_byte"]:
        for steps in (NEW_TOKENS,) if part == "causal" else step_counts():
            if f"{part}/{steps}" in done:
                continue
            if part == "causal":
                writer = presets.autoregressive(model, sampling=endless)
            else:
                writer = presets.reverse_process(model, sampling=endless, canvas_length=0, denoising_steps=steps)
            answer = pipeline.generate(model, writer, prompts, max_new_tokens=NEW_TOKENS, seed=SEED.value)
            written = np.concatenate([texts[:, :PROMPT_LENGTH], answer.generation.tokens], axis=1)
            done[f"{part}/{steps}"] = {**_quality(judge, written), "nfe": int(answer.generation.nfe)}
            record.keep(samples=done)
    if "text" not in record:
        record.keep(text=_quality(judge, texts))


def _held_out_rows(judge: LoadedModel) -> np.ndarray:
    """Begin of text, then held-out text from evenly spaced places: int32 [NUM_SAMPLES, PROMPT_LENGTH + NEW_TOKENS]."""
    text, length = read_text(judge.config, judge.meta).valid, PROMPT_LENGTH + NEW_TOKENS
    if len(text.flat) < 3 * length:
        raise ValueError(f"--data={DATA.value} holds out {len(text.flat)} tokens; prompts and texts need {3 * length}")
    starts = np.linspace(1, len(text.flat) - 2 * length, NUM_SAMPLES.value).astype(int)
    return np.stack([np.concatenate([[text.bos], text.flat[i : i + length - 1]]) for i in starts]).astype(np.int32)


_JUDGE = jax.jit(lambda bound, rows: judged(bound.denoise, rows))


def _quality(judge: LoadedModel, rows: np.ndarray) -> dict[str, float]:
    return quality(_JUDGE(judge.network, rows), rows, PROMPT_LENGTH)._asdict()


def rows(records: dict[str, dict]) -> list[dict]:
    """A line for each part of each kind's objective, one for a kind that failed; the held-out text comes last."""
    lines = []
    for kind, record in records.items():
        if "failed" in record:
            lines.append({"kind": kind, "failed": record["failed"]})
            continue
        for part, bits in record["bits_per_byte"].items():
            scores = {"bits_per_byte": bits, "standard_error": record["standard_error"][part]}
            name = kind if len(record["bits_per_byte"]) == 1 else f"{kind}, {part}"
            samples = {int(k.split("/")[1]): v for k, v in record["samples"].items() if k.split("/")[0] == part}
            lines.append({"kind": name, **scores, "tokens_per_s": record["tokens_per_s"], "samples": samples})
    return [*lines, {"kind": "held-out text", "samples": {NEW_TOKENS: records["ar"]["text"]}}]


def markdown(lines: list[dict]) -> str:
    """The table. A cell of samples holds nats per token by the judge / entropy / repeated 4-grams."""
    columns = sorted({*step_counts(), NEW_TOKENS})  # the last column is the only one of autoregressive samples
    head = ["kind", "bits per byte", "training tokens/s", *(f"{n} step{'s' * (n > 1)}" for n in columns)]
    table = [head, ["---"] * len(head)]
    for line in lines:
        if "failed" in line:
            table.append([line["kind"], f"failed: {line['failed']}", *[""] * (len(head) - 2)])
            continue
        bits, speed = line.get("bits_per_byte"), line.get("tokens_per_s")
        table.append(
            [
                line["kind"],
                "" if bits is None else f"{bits:.3f} ± {line['standard_error']:.3f}",
                "" if speed is None else f"{speed:,.0f}",
                *(_cell(line["samples"].get(n)) for n in columns),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def _cell(found: dict | None) -> str:
    if found is None:
        return ""
    return f"{found['nats_per_token']:.2f} / {found['entropy']:.2f} / {100 * found['repeated']:.0f} %"


def draw(lines: list[dict], path: Path) -> None:
    """Nats per token by the judge over denoising steps; a kind with one number is a level line."""
    series = {}
    for line in lines:
        nats = {n: found["nats_per_token"] for n, found in line.get("samples", {}).items()}
        series[line["kind"]] = [nats.get(n, next(iter(nats.values()))) for n in step_counts()] if nats else []
    curve(
        step_counts(),
        {name: ys for name, ys in series.items() if ys},
        path,
        title="Quality of samples",
        x_label="denoising steps a canvas",
        y_label="nats per token (by ar)",
        log_x=True,
    )


if __name__ == "__main__":
    command.run(main, FLAGS)
