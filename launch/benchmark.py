"""Measures speed and memory beside plain PyTorch and Hugging Face Transformers, in one run.

    python -m launch.benchmark --suite=train|processes|decode|canvas|memory|engine|feeding|all --out=rows.json
    python -m launch.benchmark --suite=tradeoffs --workdir=runs/quickstart [--judge=runs/other] --charts=charts
    python -m launch.benchmark --suite=drift --workdir=runs/masked --charts=charts

Tables go to standard error; the last line on standard output is a JSON object with all rows. The legs to compare with
need the extra [bench], with a CPU build of torch; without it their rows are skipped with a reason.
"""

import dataclasses
import json
import logging
import sys
from pathlib import Path

from absl import flags as absl_flags

from diffusion_lm.objectives.autoregressive import AutoregressiveLoss as NextToken
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.embedding_flow import EmbeddingFlowLoss
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.objectives.learned_noise import LearnedNoise
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.flow import UniformFlow
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.processes.mixture import Mixture
from diffusion_lm.processes.score import AbsorbingScore, UniformScore
from diffusion_lm.processes.state_dependent import LearnedMasking
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from launch import flags
from launch.benchmarks import jax_cases, timing, torch_cases
from launch.benchmarks.cache_drift import drift
from launch.benchmarks.data_loading import feeding
from launch.benchmarks.sampling_overhead import engine
from launch.benchmarks.timing import Row, Timing
from launch.benchmarks.tradeoffs import tradeoffs

log = logging.getLogger("diffusion_lm.benchmark")
TRAIN = jax_cases.Sizes(vocab=8192, width=384, layers=6, heads=6, mlp=1312)  # 18.9M parameters, the tables untied
DECODE = jax_cases.Sizes(vocab=32_000, width=512, layers=12, heads=8, mlp=1408)
ROWS, LENGTH = 8, 256
PROMPT, NEW = 128, 256
PROCESSES = {
    "masked": (Absorbing(), ELBO()),
    "masked, 1000 steps": (Absorbing(), ELBO(num_timesteps=1000)),
    "uniform": (Uniform(), ELBO()),
    "uniform, 1000 steps": (Uniform(), ELBO(num_timesteps=1000)),
    "mixture": (Mixture(), ELBO()),
    "score": (AbsorbingScore(), ELBO()),
    "uniform score": (UniformScore(), ELBO()),
    "flow": (UniformFlow(), ELBO()),
    "embedding": (Gaussian(width=TRAIN.width), EmbeddingFlowLoss()),
    "learned": (LearnedMasking(), LearnedNoise()),
}
FLOORS = {32: 70, 64: 115, 256: 240}  # tokens/s at 12 passes, on a quiet machine on which ...
QUIET_TRANSFORMERS = 74  # ... Transformers' decoding reads this many
WRITES = {"mask": DECODE.vocab, "eos": DECODE.vocab + 1}  # an end of text that is no piece: all NEW tokens are written


def train() -> list[Row]:
    """Tokens/s of one update, PyTorch's beside it."""
    absent = torch_cases.missing("torch")
    ours = {
        "ours": jax_cases.TrainStep(TRAIN, NextToken(), batch=ROWS, length=LENGTH),
        "block": jax_cases.TrainStep(TRAIN, BlockELBO(block_size=16), batch=ROWS, length=LENGTH),
        "joint": jax_cases.TrainStep(TRAIN, Joint(), batch=ROWS, length=LENGTH),
    }
    theirs = {} if absent else {"theirs": torch_cases.train_step(batch=ROWS, length=LENGTH, **_as_dict(TRAIN))}
    timings = timing.alternate(ours | theirs, repeats=5)
    size = f"{ours['ours'].parameters / 1e6:.1f}M parameters, untied, bfloat16 products"
    tokens = ROWS * LENGTH
    note = f"{size}; PyTorch: float32, full logits"
    return [
        _compared("train autoregressive", timings, tokens, absent, target="ratio >= 2", note=note),
        *(
            _doubled(f"train {n} (canvas 16)", timings[n], timings["ours"], tokens, note=size)
            for n in ("block", "joint")
        ),
    ]


def processes() -> list[Row]:
    """Tokens/s of one update under each noise, beside masks, with one network."""
    made = {
        name: jax_cases.TrainStep(TRAIN, objective, process, batch=ROWS, length=LENGTH, time_conditioning=True)
        for name, (process, objective) in PROCESSES.items()
    }
    timings, tokens, rows = timing.alternate(made, repeats=5), ROWS * LENGTH, []
    for name, timed in timings.items():
        note = "reads each row twice" if name == "learned" else ""
        row = _alone(f"train {name}", timed, tokens, target="ratio >= 0.87: at most 1.15 x masked", note=note)
        rows.append(timing.beside(row, timed, timings["masked"], tokens))
    return rows


def decode() -> list[Row]:
    """Tokens/s of writing token by token, greedily, one row; Transformers' generate beside it."""
    writer = AutoregressiveSampler(draw=SamplingParams(temperature=0), **WRITES)
    network = jax_cases.random_network(DECODE).for_sampling(rows=1)
    timings, absent = _with_transformers({"ours": jax_cases.generation(network, writer, prompt=PROMPT, new=NEW)})
    note = "greedy, batch 1; Transformers: a Llama of the same sizes, float32, with its cache"
    return [_compared("decode autoregressive", timings, NEW, absent, target="ratio >= 1, aim 1.5", note=note)]


def canvas() -> list[Row]:
    """Tokens/s of writing canvas by canvas over the exact cache, and what a pass costs."""
    network = jax_cases.random_network(DECODE)
    held = {(width, 12): _canvases(network, width, 12) for width in FLOORS}
    free = {(256, passes): _canvases(network, 256, passes) for passes in (1, 2, 4, 8, 16)}
    timings, absent = _with_transformers(held)
    quiet = None if absent else QUIET_TRANSFORMERS / (NEW / timings.pop("theirs").wall)
    timings |= timing.alternate(free, repeats=3)
    rows = []
    for (width, passes), generate in (held | free).items():
        nfe = int(generate().nfe)
        rows.append(_canvas_row(width, passes, timings[width, passes], nfe, quiet, absent))
    return rows


def memory() -> list[Row]:
    """Temporaries of the loss and its gradients where the vocabulary is large."""
    sizes = {"vocab": 152_000, "positions": 8192, "width": 1024}
    found = jax_cases.loss_memory(**sizes)
    note = f"{sizes['vocab']:,} x {sizes['positions']:,}, width 1,024; reference: full logits; compiled, nothing run"
    gigabytes = {"value": found.chunked / 1e9, "reference": found.full / 1e9, "unit": "GB"}
    ratio = found.full / found.chunked
    return [Row(name="loss temporaries", **gigabytes, ratio=ratio, target="<= 1.6 GB", note=note)]


SUITES = {
    "train": train, "processes": processes, "decode": decode, "canvas": canvas, "memory": memory, "engine": engine,
    "feeding": feeding,
}  # fmt: skip
OF_A_RUN = ("tradeoffs", "drift")
SUITE = absl_flags.DEFINE_enum(
    "suite", "all", [*SUITES, *OF_A_RUN, "all"], "What to measure; all: what needs no --workdir."
)
WORKDIR = absl_flags.DEFINE_string("workdir", None, "tradeoffs, drift: the run whose checkpoint is measured.")
JUDGE = absl_flags.DEFINE_string("judge", None, "tradeoffs: the run that judges text; none: the same.")
CHARTS = absl_flags.DEFINE_string("charts", "charts", "tradeoffs, drift: the folder for charts.")
OUT = absl_flags.DEFINE_string("out", None, "A file for the same JSON object.")


def main() -> dict:
    if OUT.value and not Path(OUT.value).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out={OUT.value}: there is no such folder")
    if (SUITE.value in OF_A_RUN) != (WORKDIR.value is not None):
        raise ValueError("--workdir goes with --suite=tradeoffs or drift, which need one")
    rows, charts = [], Path(CHARTS.value)
    suites = {
        **SUITES,
        "tradeoffs": lambda: tradeoffs(WORKDIR.value, JUDGE.value, charts),
        "drift": lambda: drift(WORKDIR.value, charts),
    }
    for name in SUITES if SUITE.value == "all" else [SUITE.value]:
        log.info("measuring %s", name)
        found = suites[name]()
        print(timing.table(found), file=sys.stderr, flush=True)
        rows += found
    result = {**timing.provenance(), "rows": [_as_dict(row) for row in rows]}
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _canvases(network, width: int, passes: int):
    writer = BlockDiffusion(sampler=Confidence(passes=passes, eos=WRITES["eos"]), canvas=width, **WRITES)
    return jax_cases.generation(network.for_sampling(rows=width), writer, prompt=PROMPT, new=NEW)


def _with_transformers(ours: dict) -> tuple[dict, str]:
    """Timings of our legs and, if it can run, of "theirs"; and why it can't."""
    absent = torch_cases.missing("torch", "transformers")
    theirs = {} if absent else {"theirs": torch_cases.decode(prompt=PROMPT, new=NEW, **_as_dict(DECODE))}
    return timing.alternate(ours | theirs, repeats=3), absent


def _compared(name: str, timings: dict[str, Timing], tokens: int, absent: str, *, target: str, note: str) -> Row:
    row = _alone(name, timings["ours"], tokens, target=target, note=note)
    if absent:
        return dataclasses.replace(row, skipped=f"the reference: {absent}")
    return timing.beside(row, timings["ours"], timings["theirs"], tokens)


def _doubled(name: str, timed: Timing, causal: Timing, tokens: int, *, note: str) -> Row:
    """An update that reads clean and noisy rows side by side, beside one of the same rows read causally."""
    told = {"target": "ratio >= 0.476: at most 2.1 x a causal step", "note": f"{note}; beside it: autoregressive"}
    return timing.beside(_alone(name, timed, tokens, **told), timed, causal, tokens)


def _alone(name: str, timed: Timing, tokens: int, **told: str) -> Row:
    return Row(name=name, value=tokens / timed.wall, unit="tokens/s", cpu_s=timed.cpu, **told)


def _canvas_row(width: int, passes: int, timed: Timing, nfe: int, quiet: float | None, absent: str) -> Row:
    row = _alone(f"canvas {width}, {passes} passes", timed, NEW, note=f"NFE {nfe}, {nfe / timed.wall:.1f} passes/s")
    if passes != 12:
        return row
    target = f">= {FLOORS[width]} tokens/s where Transformers reads {QUIET_TRANSFORMERS}"
    if quiet is None:
        return dataclasses.replace(row, target=target, skipped=f"the normalised value: {absent}")
    note = f"{row.note}; normalised {row.value * quiet:.1f} (x {QUIET_TRANSFORMERS} / Transformers here)"
    return dataclasses.replace(row, target=target, ratio=row.value * quiet / FLOORS[width], note=note)


def _as_dict(item) -> dict:
    return dataclasses.asdict(item)


if __name__ == "__main__":
    flags.run(main)
