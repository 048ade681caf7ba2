"""Chain family on the same text with the same network, updates and optimizer: one table, one figure.

    python -m launch.compare --data=input.txt --budget=10 --workdir=runs/compare --out=runs/compare

Families are kinds of configs/tinyshakespeare.py, with settings of their own behind colons where there are any:
mixture:process.uniform=0.2. All make the same number of updates, as many as fit `--budget` minutes a family on average
by their speed in a first few; `ar` comes first, as it judges what the others write. A student (kinds `distilled...`)
makes its updates behind those of its teacher, the family of the same network, noise and objective, and isn't asked for
its speed beforehand. Started again, it goes on from where it was, within a family too. A family that fails keeps its
row and says why. Written: table.md and figure.png (or --figure=svg), and as the last line on standard output a JSON
object.
"""

import functools
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from diffusion_lm.build import LoadedModel, build, build_loss, load_for_inference, read_text
from diffusion_lm.config import Config, load, override
from diffusion_lm.data import loader
from diffusion_lm.evaluation.generation_quality import judged, quality
from diffusion_lm.evaluation.likelihood import held_out
from diffusion_lm.inference import presets
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.training import loop
from diffusion_lm.visualize.page import write_whole
from diffusion_lm.visualize.plots import curve
from launch import flags as launch_flags
from launch.benchmarks.timing import updates

CONFIG = Path(__file__).parents[1] / "configs/tinyshakespeare.py"
DATA = flags.DEFINE_string("data", None, "A file, folder or glob of text.", required=True)
ALL = "ar,masked,uniform,mixture,score,flow,embedding,joint,joint_uniform"
FAMILIES = flags.DEFINE_list("families", ALL, "Kinds to train, ar among them; or KIND:KEY=VALUE.")
BUDGET = flags.DEFINE_float("budget", 10.0, "Minutes a family, on average.")
WORKDIR = launch_flags.define_workdir()
OUT = flags.DEFINE_string("out", None, "Folder for table and figure; none: the workdir.")
FIGURE = flags.DEFINE_enum("figure", "png", ["png", "svg"], "The figure's format.")
SEED = flags.DEFINE_integer("seed", 0, "Of the parameters, the order of the text, all noise and all draws.")
TEXTS = flags.DEFINE_integer("texts", 128, "Texts written at each number of passes.")
PASSES = flags.DEFINE_list("passes", "1,2,4,8,16,64", "Passes a canvas at which the families write.")
SETTINGS = flags.DEFINE_multi_string("set", [], "KEY=VALUE for every family, as in model.width=256.")
GIVEN, WRITTEN = 16, 64  # a row, which blocks of 16 divide: begin of text and 15 held-out characters, then samples


def main() -> dict:
    started, home = time.perf_counter(), Path(WORKDIR.value)
    families, records = _families(), {}
    home.mkdir(parents=True, exist_ok=True)
    plan = _plan(home, families)
    for family in families:
        record = records[family] = Record(home / family / "record.json")
        config = _config(family, plan["steps"])
        if teacher := _teacher(family, families):
            config = override(config, [f"objective.teacher={home / teacher}"])
            if "failed" in records[teacher]:
                record.keep(failed=f"its teacher, {teacher}, failed")
        if not _train(family, config, home / family, record):
            return {"interrupted": family, **plan}
        if "failed" not in record:
            model, judge = load_for_inference(home / family), load_for_inference(home / "ar")
            _score(model, record)
            _sample(model, judge, record)
    out, lines = Path(OUT.value or home), rows(records)
    out.mkdir(parents=True, exist_ok=True)
    table, figure = out / "table.md", out / f"figure.{FIGURE.value}"
    write_whole(table, markdown(lines).encode())
    draw(lines, figure)
    seconds = round(time.perf_counter() - started, 1)
    return {**plan, "rows": lines, "table": str(table), "figure": str(figure), "seconds": seconds}


def _families() -> list[str]:
    """ar first, students behind their teachers."""
    families = list(dict.fromkeys(FAMILIES.value))
    for check in (passes_asked, *(functools.partial(_teacher, family, families) for family in families)):
        check()  # what is wrong with any of it is said before the first update
    families.sort(key=lambda family: (family != "ar", _is_student(_config(family))))
    if families[:1] != ["ar"]:
        raise ValueError("--families needs ar among them: it judges what the others write")
    if not BUDGET.value > 0 or TEXTS.value < 2:
        raise ValueError(f"--budget={BUDGET.value} must be above 0 and --texts={TEXTS.value} at least 2")
    return families


def passes_asked() -> list[int]:
    """The numbers of --passes; ValueError where they are none."""
    if not all(n.isdecimal() and int(n) for n in PASSES.value):
        raise ValueError(f"--passes takes numbers from 1 on, as in 1,4,16; got {','.join(PASSES.value)}")
    return [int(n) for n in PASSES.value]


def _config(family: str, steps: int = 20) -> Config:
    """The family's kind on rows of one length, as it is set."""
    kind, *own = family.split(":")
    fixed = [
        f"data.path={DATA.value}",
        f"data.seq_len={GIVEN + WRITTEN}",
        f"train.steps={steps}",
        "train.eval_every=0",
        "train.eval_batches=1",
    ]
    return override(load(f"{CONFIG}:{kind}"), [*fixed, f"seed={SEED.value}", *SETTINGS.value, *own])


def _is_student(config: Config) -> bool:
    return isinstance(config.objective, Distillation)


def _teacher(family: str, families: list[str]) -> str | None:
    """The family that this one learns from, if it is a student; ValueError where there is none."""
    asked = _config(family)
    if not _is_student(asked):
        return None
    wanted = (asked.model, asked.process, asked.objective.objective)
    for other in families:
        found = _config(other)
        if (found.model, found.process, found.objective) == wanted:
            return other
    raise ValueError(f"--families: {family} needs a teacher among them, of the same network, noise and objective")


class Record(dict):
    """What is known of a family, kept as it comes."""

    def __init__(self, path: Path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self._path = path

    def keep(self, **found) -> None:
        self.update(found)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self, indent=1).encode())


def _plan(home: Path, families: list[str]) -> dict:
    """How many updates each family makes: chosen once, by a look at each one's speed, and kept."""
    asked = {"data": DATA.value, "budget_minutes": BUDGET.value, "seed": SEED.value, "settings": list(SETTINGS.value)}
    plan = Record(home / "plan.json")
    if any(plan.get(name, value) != value for name, value in asked.items()):
        was = {name: plan[name] for name in asked}
        raise ValueError(f"--workdir={home} holds another comparison, {json.dumps(was)}: use a new one")
    if "steps" not in plan:
        configs = {family: _config(family) for family in families}
        slow = {family: _seconds_an_update(c) for family, c in configs.items() if not _is_student(c)}
        fit = 60 * BUDGET.value * len(slow) / sum(slow.values())
        plan.keep(**asked, steps=max(10, int(fit) // 10 * 10), seconds_an_update=slow)
    return dict(plan)


def _seconds_an_update(config: Config) -> float:
    with tempfile.TemporaryDirectory() as nowhere:
        return updates(build(config, nowhere).job)[1]


def _train(family: str, config: Config, home: Path, record: Record) -> bool:
    """False if it was told to stop."""
    if "steps" in record or "failed" in record:
        return True
    run = build(config, home)
    try:
        done = loop.run(run.job, config.train, home, run.checkpoints)
    except loop.NonFiniteError as error:
        if family == "ar":
            raise  # nobody is left to judge
        record.keep(failed=str(error))
        return True
    if not done.interrupted:
        record.keep(steps=config.train.steps, tokens_per_s=done.tokens_per_s, train_seconds=done.seconds)
    return not done.interrupted


def _score(model: LoadedModel, record: Record) -> None:
    """Bits a byte of held-out text, for each part of the objective."""
    if "bits_per_byte" in record:
        return
    text, config = read_text(model.config, model.meta).valid, model.config
    loss = build_loss(config, model.bound.module, model.process, bound=True)
    losses = jax.jit(lambda params, key, batch: loss(params, key, batch))
    batches = loader.eval_batches(text, length=config.data.seq_len, batch=64)
    found = held_out(
        lambda key, batch: losses(model.bound.params, key, batch), batches, text, jax.random.key(SEED.value)
    )
    errors = {part: e.standard_error * e.bits_per_byte / e.nats_per_token for part, e in found.items()}
    record.keep(bits_per_byte={part: e.bits_per_byte for part, e in found.items()}, standard_error=errors)


def _sample(model: LoadedModel, judge: LoadedModel, record: Record) -> None:
    """What each part of the objective writes at each number of passes, judged; and the held-out text itself."""
    texts, done = _held_out_rows(judge), record.get("samples", {})
    prompts = [model.tokenizer.decode(row[1:GIVEN]) for row in texts]
    forbidden = SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))  # all write equally much
    for part in record["bits_per_byte"]:
        for passes in (WRITTEN,) if part == "causal" else passes_asked():
            if f"{part}/{passes}" in done:
                continue
            if part == "causal":
                writer = presets.autoregressive(model, draw=forbidden)
            else:
                writer = presets.reverse(model, draw=forbidden, canvas=0, passes=passes)
            answer = presets.write(model, writer, prompts, length=WRITTEN, seed=SEED.value)
            written = np.concatenate([texts[:, :GIVEN], answer.generation.tokens], axis=1)
            done[f"{part}/{passes}"] = {**_quality(judge, written), "nfe": int(answer.generation.nfe)}
            record.keep(samples=done)
    if "text" not in record:
        record.keep(text=_quality(judge, texts))


def _held_out_rows(judge: LoadedModel) -> np.ndarray:
    """Begin of text, and what follows evenly spaced places of the held-out text: int32 [texts, GIVEN + WRITTEN]."""
    text, length = read_text(judge.config, judge.meta).valid, GIVEN + WRITTEN
    if len(text.flat) < 3 * length:
        raise ValueError(f"--data={DATA.value} holds out {len(text.flat)} tokens; prompts and texts need {3 * length}")
    starts = np.linspace(1, len(text.flat) - 2 * length, TEXTS.value).astype(int)
    return np.stack([np.concatenate([[text.bos], text.flat[i : i + length - 1]]) for i in starts]).astype(np.int32)


_ASK = jax.jit(lambda bound, rows: judged(bound.denoise, rows))


def _quality(judge: LoadedModel, rows: np.ndarray) -> dict[str, float]:
    return quality(_ASK(judge.bound, rows), rows, GIVEN)._asdict()


def rows(records: dict[str, dict]) -> list[dict]:
    """A line for each part of each family's objective; one for a family that failed; the text itself comes last."""
    lines = []
    for family, record in records.items():
        if "failed" in record:
            lines.append({"family": family, "failed": record["failed"]})
            continue
        for part, bits in record["bits_per_byte"].items():
            told = {"bits_per_byte": bits, "standard_error": record["standard_error"][part]}
            name = family if len(record["bits_per_byte"]) == 1 else f"{family}, {part}"
            samples = {int(k.split("/")[1]): v for k, v in record["samples"].items() if k.split("/")[0] == part}
            lines.append({"family": name, **told, "tokens_per_s": record["tokens_per_s"], "samples": samples})
    return [*lines, {"family": "the text itself", "samples": {WRITTEN: records["ar"]["text"]}}]


def markdown(lines: list[dict]) -> str:
    """The table. A cell of samples: nats a token by the judge / entropy / repeated 4-grams."""
    columns = sorted({*passes_asked(), WRITTEN})  # the last is all that a family has that writes token by token
    head = ["family", "bits per byte", "training tokens/s", *(f"{n} pass{'es' * (n > 1)}" for n in columns)]
    table = [head, ["---"] * len(head)]
    for line in lines:
        if "failed" in line:
            table.append([line["family"], f"failed: {line['failed']}", *[""] * (len(head) - 2)])
            continue
        bits, speed = line.get("bits_per_byte"), line.get("tokens_per_s")
        table.append(
            [
                line["family"],
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
    """Nats by the judge over passes; what has one number only is a level line."""
    series = {}
    for line in lines:
        nats = {n: found["nats_per_token"] for n, found in line.get("samples", {}).items()}
        series[line["family"]] = [nats.get(n, next(iter(nats.values()))) for n in passes_asked()] if nats else []
    labels = {"x_label": f"log2 of the passes a canvas ({', '.join(PASSES.value)})", "y_label": "nats a token (ar)"}
    curve(
        np.log2(passes_asked()),
        {name: ys for name, ys in series.items() if ys},
        path,
        title="What is written",
        **labels,
    )


if __name__ == "__main__":
    launch_flags.run(main)
