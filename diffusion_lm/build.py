"""Assembles a config into a training run, and a workdir into a network for sampling. No other file knows all parts."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_lm import lock, sharding
from diffusion_lm.config import Config, allowed_by, decode, encode, to_json
from diffusion_lm.data.source import TokenizedCorpus, TokenizedData
from diffusion_lm.data.tokenizer import Tokenizer
from diffusion_lm.loaded_model import (
    BASE,
    LoadedModel,
    begin_with,
    build_elbo,
    build_init,
    build_loss,
    build_model,
    frozen_base,
    laid_out,
    load_base,
    load_for_inference,
    resolve,
)
from diffusion_lm.models import flops
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import Transformer
from diffusion_lm.nn.lora import LoRA
from diffusion_lm.processes.base import Process
from diffusion_lm.training.checkpoint import CheckpointMeta, Checkpoints
from diffusion_lm.training.loop import TrainLoop
from diffusion_lm.training.step import LossFn, Stages, stages_of
from diffusion_lm.training.update import Constants, InitFn, build_update
from diffusion_lm.types import Batch
from diffusion_lm.validation import check_config, check_kernel, check_rows, check_workdir

Array = jax.Array
__all__ = [
    "Experiment",
    "LoadedModel",
    "abstract_batch",
    "build",
    "build_elbo",
    "build_init",
    "build_loss",
    "build_model",
    "load_for_inference",
    "resolve",
]


class Experiment(NamedTuple):
    """What `training.loop.run` takes, and the parts that it was made from."""

    config: Config
    job: TrainLoop
    checkpoints: Checkpoints
    data: TokenizedData
    module: Transformer
    process: Process


def build(config: Config, workdir: Path | str) -> Experiment:
    """Assembles a run. Reads the data, and the workdir's checkpoint if there is one; writes nothing.

    Raises ValueError, OSError or CheckpointError with one line if config, data, mesh, workdir or checkpoint are wrong.
    """
    check_workdir(workdir)
    lock.check(Path(workdir) / lock.NAME)
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    check_kernel(config, mesh)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    stored, base = checkpoints.meta(), None
    adapted = isinstance(config.trainable, LoRA)
    if adapted and not config.train.init:
        raise ValueError("trainable=LoRA() needs a network to be trained beside: --set=train.init=WORKDIR")
    if config.train.init and (stored is None or adapted):
        base = load_base(config, stored and stored[1].base)
    config = resolve(config, stored[1].config if stored else base and base.meta.config)
    if adapted:  # found again from any folder
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, init=str(Path(config.train.init).absolute()))
        )
    if stored is not None:
        check_config(config, stored[1], checkpoints.path(stored[0]))
    data = read_data(config, stored and stored[1], base and base.tokenizer)
    module, process = build_model(config, data.tokenizer)
    losses = build_loss(config, module, process), build_elbo(config, module, process)
    constants = load_constants(config, data.tokenizer, module, process, mesh)
    start = None if base is None else begin_with(config, module, process, base)
    if adapted:
        constants[BASE] = frozen_base(base, start, mesh)
    begun = {} if adapted or base is None else {"init": laid_out(base, mesh)}
    job = build_job(config, data, mesh, *losses, build_init(module, process, start), constants, begun)
    if adapted:
        fingerprint = Checkpoints(config.train.init).fingerprint(base.step)
        job = dataclasses.replace(job, meta=dataclasses.replace(job.meta, base=fingerprint))
    job = dataclasses.replace(job, flops=functools.cache(lambda: update_flops(config, module, process)))
    return Experiment(config, job, checkpoints, data, module, process)


def read_data(
    config: Config, stored: CheckpointMeta | None = None, tokenizer: Tokenizer | None = None
) -> TokenizedData:
    """Opens what a config trains on, for a given tokenizer or the checkpoint's. Raises ValueError if it isn't what the
    checkpoint `stored` was trained on."""
    if stored is None:
        return config.data.open(config.objective.layout, tokenizer=tokenizer)
    tokenizer = decode(stored.tokenizer, allowed_by(config), "tokenizer")
    data = config.data.open(config.objective.layout, tokenizer=tokenizer, fingerprint=stored.corpus)
    if data.fingerprint != stored.corpus:
        raise ValueError("the data is not what the checkpoint was trained on: restore it, or use a new workdir")
    return data


def read_text(config: Config, stored: CheckpointMeta | None = None) -> TokenizedCorpus:
    """As `read_data`; raises ValueError if the config doesn't train on text."""
    data = read_data(config, stored)
    if not isinstance(data, TokenizedCorpus):
        raise ValueError(
            f"data={type(config.data).__name__} is not a text corpus, which this needs; launch.planning.scoreboard "
            "evaluates models of planning tasks"
        )
    return data


def load_constants(
    config: Config, tokenizer: Tokenizer, module: Transformer, process: Process, mesh: jax.sharding.Mesh
) -> dict[str, BoundModel]:
    """The frozen networks that the objective names, laid out on the mesh as parameters are.

    Raises ValueError if one differs in network, process, objective or tokenizer from what is trained.
    """
    constants = {}
    for name, workdir in config.objective.frozen.items():
        if not workdir:
            raise ValueError(f"the objective needs a trained workdir: --set=objective.{name}=WORKDIR")
        model = load_for_inference(workdir, allow_import=allowed_by(config))
        _check_same(config, tokenizer, model, f"objective.{name}={workdir}")
        constants[name] = laid_out(model, mesh).replace(module=module)
    return constants


def _check_same(config: Config, tokenizer: Tokenizer, model: LoadedModel, setting: str) -> None:
    trained_by = getattr(model.config.objective, "objective", model.config.objective)  # a teacher may be a student
    same = {
        "model": config.model == model.config.model,
        "process": config.process == model.config.process,
        "objective.objective": getattr(config.objective, "objective", trained_by) == trained_by,
        "tokenizer": tokenizer.fingerprint == model.tokenizer.fingerprint,
    }
    if differing := [key for key, equal in same.items() if not equal]:
        raise ValueError(f"{setting} has another {', '.join(differing)}: set them alike")


def update_flops(config: Config, module: Transformer, process: Process) -> int:
    """An update's useful operations, by the formula of `models.flops`; of stages, in the mean over a run."""
    process, batch = process.with_params(process.init_params()), abstract_batch(config)
    frozen, total, start = config.objective.frozen, 0.0, 0.0
    for end, stage in config.objective.stages():

        def objective(denoise, teacher, key, batch, stage=stage):
            return stage(denoise, process, key, batch, **dict.fromkeys(frozen, teacher))

        total += (end - start) * flops.of_update(module, objective, batch)
        start = end
    return round(config.train.grad_accum_steps * total)


def abstract_batch(config: Config) -> Batch:
    """The shapes of one micro-batch."""
    shape = (config.train.batch_size // config.train.grad_accum_steps, config.data.seq_len)
    ids, flags = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.bool_)
    return Batch(tokens=ids, segment_ids=ids, positions=ids, context_mask=flags, loss_mask=flags)


def build_job(
    config: Config,
    data: TokenizedData,
    mesh: jax.sharding.Mesh,
    loss: LossFn | Stages,
    elbo: LossFn,
    init: InitFn,
    constants: Constants,
    begun: dict[str, BoundModel] | None = None,
) -> TrainLoop:
    """All that the loop calls, jitted and laid out on the mesh. Raises ValueError if rows and objective don't fit.

    begun: further constants of `init` alone; the first call of the loop's `initial` empties it.
    """
    begun = {} if begun is None else begun
    init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    update = build_update(config.train, config.optim, mesh, loss, init, {**constants, **begun})
    for each in stages_of(loss).losses:
        jax.eval_shape(each, update.abstract.params, train_key, abstract_batch(config), constants)
    rows, mine = config.train.batch_size, sharding.rows_here(mesh, config.train.batch_size)
    return TrainLoop(
        initial=lambda: update.initial(init_key, {**constants, **{name: begun.pop(name) for name in list(begun)}}),
        abstract=update.abstract,
        step=update.step,
        constants=constants,
        batches=data.train_batches(length=config.data.seq_len, batch=rows, seed=config.seed, mine=mine),
        put=lambda batch: sharding.put_batch(mesh, batch, axis=1),
        evaluate=build_evaluate(config, data, mesh, elbo, constants, eval_key),
        key=jax.jit(lambda key: key, out_shardings=sharding.replicated(mesh))(train_key),
        meta=CheckpointMeta(config=to_json(config), tokenizer=encode(data.tokenizer), corpus=data.fingerprint),
    )


def build_evaluate(
    config: Config, data: TokenizedData, mesh: jax.sharding.Mesh, loss: LossFn, constants: Constants, key: Array
) -> Callable[[Any], dict[str, float]]:
    """Makes parameters -> nats per target of each part, on train.eval_batches held-out batches with the same noise."""
    rows = config.train.batch_size // config.train.grad_accum_steps
    mine = np.asarray(sharding.rows_here(mesh, rows))
    batches = itertools.islice(data.valid_batches(length=config.data.seq_len, batch=rows), config.train.eval_batches)
    batches = [jax.tree.map(lambda x: x[mine], batch) for batch in batches]  # this host's rows
    losses = jax.jit(sharding.on(mesh, loss), out_shardings=sharding.replicated(mesh))

    def evaluate(params) -> dict[str, float]:
        totals = {}
        for i, batch in enumerate(batches):
            parts = losses(params, jax.random.fold_in(key, i), sharding.put_batch(mesh, batch), constants)
            # One batch at a time: on a CPU each that is queued holds scratch memory of its own.
            for name, part in jax.device_get(parts).items():
                totals[name] = totals[name] + part if name in totals else part
        return {f"valid/{name}": float(total.mean) for name, total in totals.items()}

    return evaluate
