"""What the legs of the suite "accelerator" share: sizes by platform, rows, and programs that are compiled side by side
and then timed one after the other."""

import concurrent.futures
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.sharding import platform
from diffusion_lm.training.clock import BANDWIDTH, PEAK
from launch.benchmarks import timing
from launch.benchmarks.timing import Row

_THREADS = 8  # programs that are compiled at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the legs measure.

    name             of these sizes
    attention        positions of a text in the smoke test, and its heads, key-value heads and their width
    train            settings of configs/base_1b.py
    network          what generates; `vocabulary` ids, of which the last is the mask
    prompt, canvas   tokens of a prompt, and of a canvas
    new              tokens that are generated one by one
    steps            denoising steps of a canvas
    block            tokens of a short canvas, which begins at a multiple of it, and `block_steps` its steps
    draft            tokens of a forked draft
    batches          rows of a generation, the most wanted first
    loss             ids, positions and width of the loss
    text             whose characters a short run learns, as in data.path
    learn            settings of configs/text8.py:joint
    learn_every      seconds of updates between evaluations
    learn_updates    the most updates
    repeats          timed calls of each program, after one that isn't
    """

    name: str
    attention: tuple[int, int, int, int]
    train: tuple[str, ...]
    network: DenoiserSpec
    vocabulary: int
    prompt: int
    canvas: int
    new: int
    steps: int
    block: int
    block_steps: int
    draft: int
    batches: tuple[int, ...]
    loss: tuple[int, int, int]
    text: str
    learn: tuple[str, ...]
    learn_every: float
    learn_updates: int
    repeats: int


ACCELERATOR = Sizes(
    name="accelerator",
    attention=(512, 8, 2, 128),
    train=("train.batch_size=8", "train.grad_accum_steps=1"),
    # Qwen3-8B's and SDAR-8B's: 8.2B parameters.
    network=DenoiserSpec(
        width=4096, layers=36, heads=32, kv_heads=8, head_dim=128, mlp_dim=12_288, tie_embeddings=False
    ),
    vocabulary=151_936,
    prompt=128,
    canvas=256,
    new=128,
    steps=12,
    block=16,
    block_steps=4,
    draft=3,
    batches=(1, 32),
    loss=(152_000, 8192, 4096),
    text="python-docs",
    learn=(
        "train.steps=1000000",
        "train.batch_size=256",
        "train.eval_batches=4",
        "train.ema_decay=0",
        "optim.schedule.warmup=100",
    ),
    learn_every=10.0,
    learn_updates=1_000_000,
    repeats=3,
)
TOY = Sizes(
    name="toy",
    attention=(64, 2, 1, 16),
    train=("train.batch_size=2", "train.grad_accum_steps=1", "data.seq_len=64", "data.vocab_size=300", "model.width=32",
           "model.layers=1", "model.heads=2", "model.kv_heads=1"),
    network=DenoiserSpec(width=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, tie_embeddings=False),
    vocabulary=300,
    prompt=8,
    canvas=16,
    new=8,
    steps=3,
    block=4,
    block_steps=2,
    draft=2,
    batches=(1,),
    loss=(2000, 1024, 32),
    text=__file__,
    learn=("data.document_unit=paragraph", "train.steps=4", "train.batch_size=2", "train.eval_batches=2",
           "train.ema_decay=0", "data.seq_len=64", "model.width=32", "model.layers=1", "model.heads=2",
           "optim.schedule.warmup=1"),
    learn_every=0.0,
    learn_updates=2,
    repeats=1,
)  # fmt: skip


def sizes_here() -> Sizes:
    """Those of the platform that JAX computes on: toys on a CPU, where they only show that all legs run."""
    return TOY if platform() == "cpu" else ACCELERATOR


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(Row):
    """A row of this suite. Where the value is a speed, the reference is what the device's peak (or its memory's
    bandwidth) would allow, and the ratio the fraction of it; both are None where the device isn't in `clock.PEAK`.

    leg        the leg that it is from
    passed     whether the value is within its target; None where there is none
    compile_s  seconds to trace and compile, beside the leg's other programs
    gigabytes  arguments, results and temporaries of the program, by the compiler's account
    pass_ms    milliseconds of a forward pass, where the row is of several alike
    """

    leg: str = ""
    passed: bool | None = None
    compile_s: float | None = None
    gigabytes: float | None = None
    pass_ms: float | None = None


class Case(NamedTuple):
    """A row to be: `prepare` compiles, `finish` runs what it returned and makes the row, without a name."""

    name: str
    prepare: Callable[[], Any]
    finish: Callable[[Any], Measured]


def in_turn(cases: Sequence[Case], *, quiet: bool = True) -> Iterator[Measured]:
    """A row for each case, in order; a case that fails becomes a row that says why.

    Args:
        cases: whose programs are compiled side by side.
        quiet: no case is run before all have been compiled, so that nothing is timed beside a compilation.
    """
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0)))) as pool:
        prepared = [pool.submit(_clocked, case.prepare) for case in cases]
        if quiet:
            concurrent.futures.wait(prepared)
        for case, future in zip(cases, prepared, strict=True):
            try:
                made, seconds = future.result()
                row = dataclasses.replace(case.finish(made), name=case.name, compile_s=round(seconds, 1))
            except Exception as error:  # out of memory, or a kernel that isn't supported: what failed is the result
                said = " ".join(f"{type(error).__name__}: {error}".split())
                row = Measured(name=case.name, skipped=said[:500])
            yield row


def _clocked(prepare: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    return prepare(), time.perf_counter() - begun


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The median of so many calls, after one that isn't counted; results are waited for."""
    timing.clocked(run)
    return statistics.median(timing.clocked(run)[0] for _ in range(repeats))


def speed(seconds: float, amount: float, unit: str, *, least: float | None, **more: Any) -> Measured:
    """The row of something that takes `seconds`, and `least` seconds by `least_seconds`."""
    reference = None if least is None else amount / least
    ratio = None if least is None else least / seconds
    return Measured(name="", value=amount / seconds, unit=unit, reference=reference, ratio=ratio, **more)


def least_seconds(operations: float, read: float = 0.0) -> float | None:
    """max(operations / peak, bytes read / bandwidth) of the device; None where they are unknown (a CPU).

    Args:
        operations: in bfloat16.
        read: bytes.
    """
    kind = jax.devices()[0].device_kind
    return max(operations / PEAK[kind], read / BANDWIDTH[kind]) if kind in PEAK else None


def gigabytes(compiled: Any) -> float:
    """Arguments, results and temporaries of a compiled program."""
    m = compiled.memory_analysis()
    whole = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return round(whole / 1e9, 3)


def random_params(abstract: Any) -> Any:
    """Parameters of these shapes and types, made on the device one by one: matrices from N(0, 0.02^2), norms' scales
    and other vectors 1."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            jnp.ones(a.shape, a.dtype) if a.ndim < 2 or path[-1].key == "scale" else _normal(key, a.shape, a.dtype)
            for key, (path, a) in zip(keys, leaves, strict=True)
        ],
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)
