"""Compiles a config for devices that needn't be present, and reports whether it fits their memory.

    python -m launch.compile --config=configs/base_1b.py --topology=v5e:16x16
    python -m launch.compile --config=configs/base_8b.py --topology=v5e:2x4 --what=sample --batch_size=8 \\
        --set=mesh.fsdp=1 --set=mesh.tensor=-1
    python -m launch.compile --config=LLaDA-8B/config.json --topology=v5e:2x4 --what=sample --set=data.seq_len=2048 \\
        --set=mesh.data=1 --set=mesh.tensor=-1

TPUs need the extra [aot]. Compiling takes seconds to minutes; --bisect compiles a few times more. Nothing is run, so no
time is measured. The last line on standard output is a JSON object: bytes are per chip; collectives are per step (of a
sampler: each loop counted once); constraints counts the sharding constraints in the program.
"""

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm import files, sharding
from diffusion_lm.attention_patterns import Causal, Full
from diffusion_lm.build import (
    LoadedModel,
    abstract_batch,
    build_init,
    build_loss,
    build_model,
    resolve,
    update_flops,
)
from diffusion_lm.config import Config
from diffusion_lm.data.tokenizer import SentencePiece
from diffusion_lm.evaluation import hlo
from diffusion_lm.inference import presets
from diffusion_lm.inference.by_name import make_sampler
from diffusion_lm.loaded_model import BASE
from diffusion_lm.models import flops
from diffusion_lm.models.bound_model import BoundModel, stored
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.training.checkpoint import Checkpoints
from diffusion_lm.training.update import build_update
from diffusion_lm.validation import check_kernel, check_rows
from launch import command, topologies
from launch.flags import Flags

log = logging.getLogger("diffusion_lm.compile")

FLAGS = Flags(command.FLAGS)
CONFIG = FLAGS.config()
TOPOLOGY = FLAGS.string("topology", None, "Devices: v5e:4x4, v5p:4x4x8, ... or cpu:8.", required=True)
NUM_SLICES = FLAGS.integer("num_slices", 1, "TPU slices of that topology.", 1)
WHAT = FLAGS.enum("what", "train", ["train", "sample"], "train: one update; sample: one whole generation.")
BATCH_SIZE = FLAGS.integer("batch_size", None, "Rows. Default: train.batch_size for an update, 1 for a generation.", 1)
DENOISING_STEPS = FLAGS.integer("denoising_steps", 16, "Denoising steps a canvas of --what=sample.", 1)
BISECT = FLAGS.bool("bisect", False, "Searches the largest batch that fits, with a few more compilations.")
CHIP_GIB = FLAGS.float("chip_gib", None, "Memory of a chip in GiB. Default: what the topology has.", 0)
OUT = FLAGS.out()
TRIES = 8  # most compilations of --bisect


class Program(NamedTuple):
    """What is compiled: its abstract, sharded arguments by name, and its useful floating-point operations."""

    jitted: Callable
    arguments: dict[str, Any]
    flops: int


class PlannedTokenizer(NamedTuple):
    """What a program needs to know of a tokenizer that may not exist yet."""

    vocab: int
    mask: int
    eos: int = 1
    bos: int = 1
    stops: tuple[int, ...] = ()


def main() -> dict:
    out, config, topology = OUT(), CONFIG(), topologies.of(TOPOLOGY.value, NUM_SLICES.value)
    begun = Checkpoints(config.train.init).meta() if config.train.init else None
    config = resolve(config, begun and begun[1].config)
    memory = topology.memory if CHIP_GIB.value is None else int(CHIP_GIB.value * topologies.GIB)
    if BISECT.value and not memory:
        raise ValueError(f"--bisect: the memory of {TOPOLOGY.value} is unknown; give it as --chip_gib")
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    check_kernel(config, mesh)
    make = {"train": train_program, "sample": sample_program}[WHAT.value]
    batch = BATCH_SIZE.value or (config.train.batch_size if WHAT.value == "train" else 1)
    found = examine(make(config, mesh, batch), memory)
    result = {
        "what": WHAT.value,
        "config": FLAGS.values.config,
        "topology": TOPOLOGY.value,
        "chips": len(topology.devices),
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "batch_size": batch,
        **found,
        "largest_batch_size": None,
        "jax": jax.__version__,
        "not_counted": "time, since nothing was run; document boundaries inside rows; a loop's later iterations",
    }
    if BISECT.value:
        unit = sharding.row_ways(mesh) * (config.train.grad_accum_steps if WHAT.value == "train" else 1)
        known = {batch // unit: _size(found)} if batch % unit == 0 else {}
        result["largest_batch_size"] = unit * largest(
            lambda n: _size(examine(make(config, mesh, n * unit), memory)), memory, known
        )
    if out:
        with files.named(out):
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


# ---- programs ----


def train_program(config: Config, mesh: jax.sharding.Mesh, batch: int) -> Program:
    """One update of `batch` rows."""
    train = dataclasses.replace(config.train, batch_size=batch, steps_per_call=1)
    config = dataclasses.replace(config, train=train)
    check_rows(config, mesh)
    module, process = build_model(config, planned_tokenizer(config))
    loss = build_loss(config, module, process)
    constants = {} if module.lora is None else {BASE: abstract_base(config, module, mesh)}
    update = build_update(config.train, config.optim, mesh, loss, build_init(module, process), constants)
    key = jax.eval_shape(lambda: jax.random.key(0))
    part = abstract_batch(config)
    whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, batch, *a.shape[1:]), a.dtype), part)
    rows = jax.tree.map(lambda a: sharding.batch_sharding(mesh, axis=1), whole)
    state = update.abstract
    arguments = {
        "state": state,
        "key": sharding.placed(key, sharding.replicated(mesh)),
        "batch": sharding.placed(whole, rows),
        "constants": constants,
    }
    return Program(update.step, arguments, update_flops(config, module, process))


def abstract_base(config: Config, module: Transformer, mesh: jax.sharding.Mesh) -> Any:
    """The frozen parameters of adapters, in the type of products as a converted model's are."""
    boxed = jax.eval_shape(lambda key: init_params(module.clone(lora=None), key), jax.random.key(0))
    placed = sharding.placed(nn.meta.unbox(boxed), sharding.state_shardings(mesh, boxed))
    return stored(placed, config.exec.compute_dtype)


def sample_program(config: Config, mesh: jax.sharding.Mesh, batch: int) -> Program:
    """Prompts of half the context and as many new tokens, by canvases if the objective trains them."""
    module, process = build_model(config, planned_tokenizer(config))
    model = LoadedModel(config, planned_tokenizer(config), process, network=None, step=0, meta=None, prepared={})
    length = config.data.seq_len // 2
    prompt = config.data.seq_len - length
    if not config.objective.layout.denoises:
        writer, width = presets.autoregressive(model, sampling=SamplingParams()), 1
    else:
        steps = DENOISING_STEPS.value
        writer = make_sampler(model, presets.fitting(model), sampling=SamplingParams(), denoising_steps=steps)
        width = writer.canvas_length
    with sharding.using(mesh):
        bound = jax.eval_shape(
            lambda key: BoundModel(module=module, params=nn.meta.unbox(init_params(module, key))).for_sampling(
                batch * width
            ),
            jax.random.key(0),
        )
        cache = jax.eval_shape(lambda: bound.empty_cache(batch, writer.slots(prompt, length)))
    boxed = jax.eval_shape(lambda key: init_params(bound.module, key), jax.random.key(0))
    params = sharding.placed(bound.params, sharding.state_shardings(mesh, boxed))
    if batch % sharding.row_ways(mesh):
        raise ValueError(
            f"--batch_size={batch} isn't a multiple of the mesh's {sharding.row_ways(mesh)} parts; set mesh.tensor=-1"
        )

    def rows(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    arguments = {
        "parameters": bound.replace(params=params),
        "cache": sharding.placed(cache, sharding.cache_shardings(mesh, cache)),
        "prompt": Prompt(tokens=rows((batch, prompt), jnp.int32), length=rows((batch,), jnp.int32)),
        "keys": rows(keys.shape, keys.dtype),
    }

    def sample(bound, cache, prompt, keys):
        return writer.generate(bound, cache, prompt, keys, max_new_tokens=length)

    needed = _generation_flops(bound.module, batch, width, prompt, length)
    return Program(jax.jit(sharding.on(mesh, sample), donate_argnums=1), arguments, needed)


def _generation_flops(module: Transformer, rows: int, width: int, prompt: int, length: int) -> int:
    """Those of the prompt, and for each canvas its denoising steps and the pass that commits it to the cache."""
    passes = DENOISING_STEPS.value if width > 1 else 1
    total = flops.of_pass(module, rows=rows, length=prompt, attention=Causal(), num_logits=1)
    for past in range(prompt, prompt + length, width):
        total += passes * flops.of_pass(module, rows=rows, length=width, attention=Full(), past=past)
        total += flops.of_pass(module, rows=rows, length=width, attention=Causal(), past=past) if width > 1 else 0
    return total


def planned_tokenizer(config: Config) -> PlannedTokenizer:
    """The config's vocabulary, or its upper bound before the tokenizer is trained."""
    if config.model.vocabulary is not None:
        return PlannedTokenizer(config.model.vocabulary.size, config.model.vocabulary.mask)
    tokenizer = getattr(config.data, "tokenizer", None)
    tokenizer = SentencePiece.load(tokenizer) if isinstance(tokenizer, str) else tokenizer
    size = config.data.vocab_size if tokenizer is None else tokenizer.vocab
    return PlannedTokenizer(size, size)


# ---- compilation ----


def examine(program: Program, memory: int) -> dict:
    """Compiles the program; returns whether it fits, bytes a chip, operations and collectives."""
    started = time.monotonic()
    lowered = program.jitted.lower(*program.arguments.values())
    result = {"fits": None, "bytes": _argument_bytes(program.arguments), "flops": program.flops}
    result["constraints"] = lowered.as_text().count("sdy.sharding_constraint")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _needed(str(error), sum(result["bytes"].values()))
        result |= {"fits": False, "bytes": result["bytes"] | {"total": needed}}
        result |= {"largest_temporaries": _named(str(error)), "collectives": None, "kernels": None}
        log.info("doesn't fit: needs %s of %s bytes a chip", f"{result['bytes']['total']:,}", f"{memory:,}")
        return result
    stats, text = compiled.memory_analysis(), hlo.read(compiled.as_text())
    total = (
        stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    )  # fmt: skip
    result["fits"] = total <= memory if memory else None
    result["bytes"] |= {
        "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
        "total": total,
    }
    result |= {"largest_temporaries": text.largest(8), "collectives": text.collectives()}
    result["kernels"] = text.kernels()
    log.info("%s bytes a chip, compiled in %.0f s", f"{total:,}", time.monotonic() - started)
    return result


def _argument_bytes(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes of each argument on a chip, without the padding of its layout; a training state is split into parts."""
    parts = dict(arguments)
    if "state" in parts:
        state = parts.pop("state")
        parts = {"parameters": state.params, "ema_parameters": state.ema_params, "optimizer": state.opt_state, **parts}
    return {name: sum(map(_on_a_chip, jax.tree.leaves(part))) for name, part in parts.items()}


def _on_a_chip(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _needed(error: str, arguments: int) -> int:
    """Bytes, from 'Used 34.80G of 15.75G hbm', or the arguments' and those of 'HLO temporaries (41.62G)'; 0 where the
    message has neither."""
    if not (found := re.search(r"(Used |HLO temporaries \()([\d.]+)([KMGT])", error)):
        return 0
    start, size, unit = found.groups()
    return int(float(size) * 2 ** (10 * " KMGT".index(unit))) + (0 if start == "Used " else arguments)


def _named(error: str) -> list[dict]:
    """The largest arrays, from the compiler's message about a program that doesn't fit."""
    found = re.findall(r"Size: ([\d.]+)([KMGT])[\s\S]*?(?:Operator: op_name=\"([^\"]*)\"|Shape: (\S+))", error)
    return [
        {"name": op or shape, "bytes": int(float(size) * 2 ** (10 * " KMGT".index(unit)))}
        for size, unit, op, shape in found
    ][:8]


def _size(found: dict) -> float:
    """Bytes a chip; infinite if it doesn't fit and the size is unknown."""
    total = found["bytes"]["total"]
    return total if found["fits"] or total else math.inf


def largest(size: Callable[[int], float], memory: int, known: dict[int, float]) -> int:
    """The largest n with size(n) <= memory, for a size that grows about linearly; 0 if even 1 is too large.

    Args:
        size: bytes for n; called at most TRIES times, after which the largest n seen to fit is returned.
        memory: bytes.
        known: sizes found before.
    """
    known = dict(known)
    for _ in range(TRIES):
        fit = max((n for n, total in known.items() if total <= memory), default=0)
        miss = min((n for n, total in known.items() if total > memory), default=None)
        if miss is not None and miss <= fit + 1:
            return fit
        n = _guess(known, memory, fit, miss)
        log.info("trying %d", n)
        known[n] = size(n)
    return max((n for n, total in known.items() if total <= memory), default=0)


def _guess(known: dict[int, float], memory: int, fit: int, miss: int | None) -> int:
    """Where the line through the two sizes nearest to `memory` crosses it, strictly between fit and miss."""
    finite = sorted((abs(total - memory), n, total) for n, total in known.items() if math.isfinite(total))[:2]
    n = 2 * fit or 1 if miss is None else (fit + miss) // 2
    if len(finite) == 2:
        (_, a, size_a), (_, b, size_b) = finite
        if size_a != size_b:
            crossing = int(a + (memory - size_a) * (b - a) / (size_b - size_a))
            n = crossing if crossing > fit else fit + 1
    n = max(fit + 1, n)
    return n if miss is None else min(n, miss - 1)


if __name__ == "__main__":
    command.run(main, FLAGS)
