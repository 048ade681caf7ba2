"""Legs of the suite "accelerator": attention against float32, updates of a 1B network, the loss with a large
vocabulary, and a short training run."""

import dataclasses
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm import sharding
from diffusion_lm.attention_patterns import (
    AttentionPattern,
    BlockCausal,
    BlockDiffusionTraining,
    Causal,
    DraftAndVerify,
    Full,
)
from diffusion_lm.build import build
from diffusion_lm.config import Config, load, override
from diffusion_lm.models.base import Execution
from diffusion_lm.nn.attention import dot_product_attention
from diffusion_lm.nn.cache import LayerKV
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.training.state import TrainState, parameter_count
from launch.benchmarks import jax_cases
from launch.benchmarks.accelerator_cases import (
    Case,
    Measured,
    Sizes,
    gigabytes,
    in_turn,
    least_seconds,
    random_params,
    seconds_of,
    speed,
)
from launch.compile import Program, train_program

CONFIGS = Path(__file__).parents[2] / "configs"
FUSED = {"gpu": "cudnn", "tpu": "splash"}  # the attention kernel of a platform, beside "chunked"
ERROR = 0.01  # of attention in bfloat16, as a share of the exact norm: several roundings of at most 2^-9 each
OBJECTIVES = {
    "autoregressive": AutoregressiveLoss(),
    "joint": Joint(block_size=32),
    "block": BlockELBO(block_size=32),
}


def kernels() -> tuple[str, ...]:
    """Attention kernels of the platform, the fused one first."""
    fused = FUSED.get(sharding.platform())
    return ("chunked",) if fused is None else (fused, "chunked")


def _is_chunked_anyway(pattern: AttentionPattern, kernel: str) -> bool:
    """Whether cuDNN has a kernel for no part of a pattern's row."""
    return kernel == "cudnn" and set(pattern.kernels) == {None}


# ---- attention ----


def smoke(sizes: Sizes, left: Callable[[], float]) -> Iterator[Measured]:
    """Every attention pattern, forward and backward in bfloat16, against a dense float32 square of scores."""
    del left
    length = sizes.attention[0]
    block, draft = max(length // 32, 2), 3
    noisy, clean = BlockDiffusionTraining(block, Causal()), BlockDiffusionTraining(block, BlockCausal(block))
    text = length // (1 + draft)
    patterns = {
        "causal": (Causal(), length),
        "full": (Full(), length),
        "block causal": (BlockCausal(block), length),
        "noisy and causal clean": (noisy, length // 2),
        "noisy and block causal clean": (clean, length // 2),
        "forked drafts": (DraftAndVerify(text, draft), text),
        "causal forked drafts": (DraftAndVerify(text, draft, causal=True), text),
    }
    cases = []
    for (name, (pattern, positions)), kernel in itertools.product(patterns.items(), kernels()):
        if _is_chunked_anyway(pattern, kernel):
            continue
        several = () if isinstance(pattern, DraftAndVerify) else (2,)
        for documents in several if several and kernel == "chunked" else (1, *several):
            program = errors_program(pattern, positions, documents, kernel, sizes)
            cases.append(
                Case(
                    f"attention, {name}, {kernel}{', 2 documents' * (documents > 1)}",
                    functools.partial(_compiled, program),
                    _judged,
                )
            )
    yield from in_turn(cases, quiet=False)


def errors_program(pattern: AttentionPattern, length: int, documents: int, kernel: str, sizes: Sizes) -> Any:
    """A jitted program, from a key to the relative error of the output, and of the gradients of queries, keys and
    values, float32 [4]."""
    _, heads, kv_heads, width = sizes.attention
    row, starts = pattern.row_length(length), np.array([[length // 2], [length // 3]])
    segment_ids = None if documents == 1 else jnp.asarray(1 + (np.arange(length)[None] >= starts), jnp.int32)
    shapes = (2, heads, row, width), (2, kv_heads, width, row), (2, kv_heads, row, width), (2, heads, row, width)

    def attend(q, k, v):
        kv, ranges = LayerKV(k=k, v=v), pattern.key_ranges(length, segment_ids)
        return dot_product_attention(q, kv, pattern, ranges, compute_dtype="bfloat16", kernel=kernel)

    def exact(q, k, v):
        highest = {"precision": jax.lax.Precision.HIGHEST}
        grouped = q.reshape(2, kv_heads, heads // kv_heads, row, width) / math.sqrt(width)
        seen = attended(pattern, length, segment_ids)[:, None, None]
        weights = jax.nn.softmax(
            jnp.where(seen, jnp.einsum("bgrqd,bgdk->bgrqk", grouped, k, **highest), -1e30), axis=-1
        )
        return jnp.einsum("bgrqk,bgkd->bgrqd", weights, v, **highest).reshape(q.shape)

    def errors(key):
        keys = jax.random.split(key, 4)
        drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        # Inputs are rounded beforehand, so that only what attention itself rounds is an error.
        *inputs, g = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in drawn)
        found, back = jax.vjp(attend, *inputs)
        expected, exact_back = jax.vjp(exact, *inputs)
        pairs = zip((found, *back(g)), (expected, *exact_back(g)), strict=True)
        return jnp.stack([jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()) for a, b in pairs])

    return jax.jit(errors)


def _compiled(program: Any) -> Any:
    return program.lower(jax.random.key(0)).compile()


def attended(pattern: AttentionPattern, length: int, segment_ids: jax.Array | None) -> jax.Array:
    """bool [1 or B, row, row]: whether a query (second axis) attends to a key."""
    row, groups = pattern.row_length(length), []
    for group in pattern.key_ranges(length, segment_ids):
        seen = jnp.zeros((1, group[0].first.shape[1], row), bool)
        for r in group:
            start, stop = r.keys or (0, row)
            index = jnp.arange(stop - start, dtype=jnp.int32)[None, None]
            here = (r.first[..., None] <= index) & (index <= r.last[..., None])
            if r.query_segment_ids is not None:
                here &= r.query_segment_ids[..., None] == r.key_segment_ids[:, None]
            seen |= jnp.pad(here, ((0, 0), (0, 0), (start, row - stop)))
        groups.append(seen)
    return jnp.concatenate(groups, axis=1)


def _judged(errors: Callable[[jax.Array], jax.Array]) -> Measured:
    out, q, k, v = (float(e) for e in errors(jax.random.key(0)))
    worst = max(out, q, k, v) if all(map(math.isfinite, (out, q, k, v))) else math.inf
    note = f"output {out:.2g}, gradients of queries {q:.2g}, keys {k:.2g}, values {v:.2g}"
    passed = worst <= ERROR
    target = f"<= {ERROR}"
    return Measured(name="", value=worst, unit="of the norm", target=target, passed=passed, note=note)


# ---- updates ----


def train(sizes: Sizes, left: Callable[[], float]) -> Iterator[Measured]:
    """Updates of configs/base_1b.py: tokens/s, and model FLOPs utilisation as the ratio."""
    del left
    (fused, *_), one = kernels(), _OneNetwork()
    first = [("autoregressive", kernel, "full") for kernel in kernels()]
    first += [("joint", "chunked", "full"), ("block", "chunked", "full")]
    then = [("autoregressive", fused, "none"), ("joint", fused, "full"), ("autoregressive", fused, "dots")]
    then += [] if _is_chunked_anyway(OBJECTIVES["block"].layout.attention, fused) else [("block", fused, "full")]
    for group in (first, then) if fused != "chunked" else (first,):
        configs = [(what, update_config(sizes, *what)) for what in group]  # read here: reading one isn't for threads
        yield from in_turn([
            Case(
                f"train {name}, {kernel}, remat {remat}",
                functools.partial(_compiled_update, config),
                functools.partial(one.timed, config, sizes.repeats),
            )
            for (name, kernel, remat), config in configs
        ])  # fmt: skip


def update_config(sizes: Sizes, objective: str, kernel: str, remat: str) -> Config:
    """configs/base_1b.py with one of OBJECTIVES, for one device."""
    config, execution = load(str(CONFIGS / "base_1b.py")), Execution(remat=remat, attention_kernel=kernel)
    changes = {"objective": OBJECTIVES[objective], "exec": execution, "mesh": sharding.MeshShape(data=1)}
    return dataclasses.replace(override(config, sizes.train), **changes)


def update_program(config: Config) -> Program:
    """The update as launch.train has it."""
    return train_program(config, sharding.make_mesh(config.mesh, jax.devices()[:1]), config.train.batch_size)


def _compiled_update(config: Config) -> tuple[Program, Any]:
    program = update_program(config)
    return program, program.jitted.lower(*program.arguments.values()).compile()


class _OneNetwork:
    """The state that updates of all objectives share: each goes on from the last one's, which it donates."""

    def __init__(self):
        self._state: TrainState | None = None

    def timed(self, config: Config, repeats: int, made: tuple[Program, Any]) -> Measured:
        program, compiled = made
        abstract, batch = program.arguments["state"], program.arguments["batch"]
        _, rows, length = batch.tokens.shape
        whole = jax.tree.map(lambda a: a[None], jax_cases.random_rows(config.data.vocab_size, rows, length))
        whole = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), whole, batch)
        key = jax.device_put(jax.random.key(0), program.arguments["key"].sharding)

        def update():
            state, self._state = self._state or _fresh(abstract), None  # donated; lost if the update fails
            self._state, metrics = jax.block_until_ready(compiled(state, key, whole, {}))
            return metrics

        seconds, finite = seconds_of(update, repeats), bool(update()["finite"].all())
        note = f"{parameter_count(abstract.params) / 1e6:.0f}M parameters, {rows} rows of {length}"
        return speed(
            seconds, rows * length, "tokens/s", least=least_seconds(program.flops), gigabytes=gigabytes(compiled),
            passed=finite, note=note if finite else f"{note}; the loss isn't finite",
        )  # fmt: skip


def _fresh(abstract: TrainState) -> TrainState:
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
    state = zeros.replace(params=random_params(abstract.params))
    return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), state, abstract)


# ---- the loss ----


def loss(sizes: Sizes, left: Callable[[], float]) -> Iterator[Measured]:
    """The loss and its gradients with a large vocabulary, in chunks and with full logits."""
    del left
    vocab, positions, width = sizes.loss
    programs = jax_cases.loss_programs(vocab=vocab, positions=positions, width=width)
    least = least_seconds(3 * 2 * vocab * positions * width)

    def prepared(program: Callable) -> Any:
        return program.lower(*programs.shapes).compile()

    def timed(compiled: Any) -> Measured:
        keys = jax.random.split(jax.random.key(0), 3)
        hidden, table, targets, weights = programs.shapes
        arrays = (
            jax.random.normal(keys[0], hidden.shape),
            0.02 * jax.random.normal(keys[1], table.shape),
            jax.random.randint(keys[2], targets.shape, 0, vocab),
            jnp.ones(weights.shape),
        )
        seconds = seconds_of(lambda: compiled(*arrays), sizes.repeats)
        note = f"{vocab:,} ids x {positions:,} positions, width {width:,}; {1e3 * seconds:.1f} ms"
        return speed(seconds, positions, "positions/s", least=least, gigabytes=gigabytes(compiled), note=note)

    yield from in_turn([
        Case("loss, in chunks", functools.partial(prepared, programs.chunked), timed),
        Case("loss, full logits", functools.partial(prepared, programs.full), timed),
    ])  # fmt: skip


# ---- a short run ----


def learn(sizes: Sizes, left: Callable[[], float]) -> Iterator[Measured]:
    """A joint network of configs/text8.py on characters, those of this Python's docstrings on an accelerator: bits a
    held-out character (or end of a text) as training goes on, until a tenth of the leg's time is left."""
    config = override(load(f"{CONFIGS / 'text8.py'}:joint"), (f"data.path={sizes.text}", *sizes.learn))
    stop, what = 0.1 * left(), f"learn {Path(sizes.text).name} characters, joint"
    with tempfile.TemporaryDirectory() as folder:
        job = build(config, folder).job
        key, (_, length) = job.key, (config.train.batch_size, config.data.seq_len)
        state, updates, spent, due = job.initial(), 0, 0.0, sizes.learn_every

        def updated(state: TrainState) -> TrainState:
            batch = jax.tree.map(lambda a: a[None], next(job.batches))
            return job.step(state, key, job.put(batch), job.constants)[0]

        state = jax.block_until_ready(updated(state))  # compiled here, as the evaluation is
        jax.block_until_ready(job.evaluate(state.params))
        while updates < sizes.learn_updates and left() > stop:
            begun = time.perf_counter()
            state = jax.block_until_ready(updated(state))
            updates, spent = updates + 1, spent + time.perf_counter() - begun
            if spent >= due or updates == sizes.learn_updates or left() <= stop:
                due += sizes.learn_every
                note = f"{updates + 1} updates of {config.train.batch_size} rows of {length}"
                for name, nats in job.evaluate(state.params).items():
                    part = {"valid/causal": "causal", "valid/canvas": "canvas of 16"}[name]
                    name = f"{what}, {part}, after {spent / 60:.2f} min"
                    yield Measured(name=name, value=nats / math.log(2), unit="bits/character", note=note)
        if not updates:
            raise ValueError("compiling left no time for an update: give more --minutes")
        least = least_seconds(updates * job.flops() / jax.device_count())
        tokens, note = updates * config.train.batch_size * length, f"{updates} updates, loading included"
        row = speed(spent, tokens, "tokens/s", least=least, note=note)
        yield dataclasses.replace(row, name=f"{what}, speed")
