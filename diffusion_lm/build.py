"""From a config to what runs, and from a workdir to a network that can be asked: the only assembler."""

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from diffusion_lm import sharding
from diffusion_lm.config import Config, Data, from_json, to_json
from diffusion_lm.data import corpora, examples, loader
from diffusion_lm.data.tokenizer import Tokenizer, train_tokenizer
from diffusion_lm.nn import flops
from diffusion_lm.nn.bound import Bound
from diffusion_lm.nn.denoiser import Denoiser, init_params
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.objectives.self_conditioning import SelfConditioned
from diffusion_lm.processes.base import Process
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.training import state as train_state
from diffusion_lm.training.checkpoint import Checkpoints, Meta
from diffusion_lm.training.loop import Job
from diffusion_lm.training.step import LossFn, make_step, make_steps
from diffusion_lm.types import Batch

log = logging.getLogger(__name__)

# What may change between a checkpoint and the run that goes on from it; anything else would be another experiment.
FREE = ("train.steps", "train.log_every", "train.eval_every", "train.eval_batches", "train.steps_per_call",
        "train.accumulate", "checkpoint.", "mesh.", "optim.", "data.path", "data.tokenizer", "data.cache",
        "data.workers")  # fmt: skip


class Text(NamedTuple):
    """A corpus as tokens, with what is held out (nothing where data.holdout is 0)."""

    tokenizer: Tokenizer
    train: loader.TokenArray
    valid: loader.TokenArray | None
    fingerprint: str

    def train_batches(self, **where) -> Iterator[Batch]:
        """See `loader.train_loader`."""
        return loader.train_loader(self.train, **where)

    def valid_batches(self, **where) -> Iterator[Batch]:
        """See `loader.eval_batches`; none where nothing is held out."""
        return iter(()) if self.valid is None else loader.eval_batches(self.valid, **where)


class Model(NamedTuple):
    """A trained network, ready to be asked."""

    config: Config
    tokenizer: Tokenizer
    process: Process
    bound: Bound
    step: int
    meta: Meta
    ready: dict  # networks made ready to sample, by their products' type: rounding a large one takes a while

    def for_sampling(self, rows: int) -> Bound:
        """`Bound.for_sampling`, once."""
        products = self.bound.sampling_products(rows)
        if products not in self.ready:
            self.ready[products] = self.bound.for_sampling(rows)
        return self.ready[products]


class Update(NamedTuple):
    """What a run repeats, laid out on a mesh; nothing of it has run yet.

    initial   key -> the state before the first step, jitted
    abstract  its shapes and shardings
    step      (state, key, batches [S, B, L]) -> state, metrics [S], jitted; donates the state
    """

    initial: Callable
    abstract: train_state.TrainState
    step: Callable


class Run(NamedTuple):
    """All that `training.loop.run` takes, and what else a launcher may want to look at."""

    config: Config
    job: Job
    checkpoints: Checkpoints
    text: Text | examples.Source
    module: Denoiser
    process: Process


def build(config: Config, workdir: Path | str) -> Run:
    """Reads the text, and the workdir's checkpoint where there is one; writes nothing.

    Raises ValueError, OSError or CheckpointError with one line: whatever is wrong with config, text, mesh or
    checkpoint is said here, before the first step.
    """
    check_workdir(workdir)
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    stored = checkpoints.meta()
    if stored is not None:
        check_config(config, stored[1], checkpoints.path(stored[0]))
    text = read_data(config, stored and stored[1])
    module, process = build_model(config, text.tokenizer)
    teacher = load_teacher(config, text.tokenizer)
    loss = build_loss(config, module, process, teacher=teacher)
    bound = build_loss(config, module, process, bound=True)
    init = functools.partial(init_params, module) if teacher is None else teacher.boxed
    job = build_job(config, text, mesh, loss, init, bound=bound)
    job = dataclasses.replace(job, flops=functools.cache(lambda: update_flops(config, module, process)))
    return Run(config, job, checkpoints, text, module, process)


def read_data(config: Config, stored: Meta | None = None) -> Text | examples.Source:
    """What a config trains on: a text, or the examples of a task."""
    if not isinstance(config.data, examples.Examples):
        return read_text(config, stored)
    found = examples.source(config.data, config.objective, stored and Tokenizer.from_bytes(stored.tokenizer))
    if stored is not None and found.fingerprint != stored.corpus:
        raise ValueError(f"data.test={config.data.test} isn't what the checkpoint avoided; use a new workdir")
    return found


def read_text(config: Config, stored: Meta | None = None) -> Text:
    """The corpus in the tokenizer's pieces: the stored one, data.tokenizer, or one trained on the training part.

    ValueError if the config trains on a task, which has no text.
    """
    data = config.data
    if not isinstance(data, Data):
        raise ValueError(f"{type(data.task).__name__} is a task and no text: launch.scoreboard says how much is solved")
    try:
        whole = corpora.corpus(data.path, documents=data.documents, field=data.field)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.path={data.path}: {error}; the config's docstring says where to get it"
        ) from None
    fingerprint = whole.fingerprint()
    if stored is not None and fingerprint != stored.corpus:
        raise ValueError(f"data.path={data.path} is not the text that the checkpoint was trained on; use a new workdir")
    train, valid = corpora.split(whole, data.holdout)
    tokenizer = _tokenizer(data, train, stored)

    def tokens(part: corpora.Corpus, name: str) -> loader.TokenArray:
        path = None if data.cache is None else Path(data.cache) / f"{name}.npy"
        return loader.tokenize(part, tokenizer, pad=max(config.objective.canvas, 1) - 1, path=path)

    held_out = tokens(valid, "valid") if data.holdout else None
    return Text(tokenizer, tokens(train, "train"), held_out, fingerprint)


def _tokenizer(data: Data, train: corpora.Corpus, stored: Meta | None) -> Tokenizer:
    given = Tokenizer.load(data.tokenizer) if data.tokenizer is not None else None
    if stored is not None:
        tokenizer = Tokenizer.from_bytes(stored.tokenizer)
        if given is not None and given.fingerprint != tokenizer.fingerprint:
            raise ValueError(f"data.tokenizer={data.tokenizer} is not the checkpoint's tokenizer; use a new workdir")
        return tokenizer
    return given or train_tokenizer(train.documents(), vocab=data.vocab, kind=data.kind)


def build_model(config: Config, tokenizer: Tokenizer) -> tuple[Denoiser, Process]:
    """The network and the noise for a tokenizer's pieces and its mask."""
    sizes = {"mask": tokenizer.mask}
    if isinstance(config.process, Gaussian):
        sizes["width"] = config.model.width
    process = dataclasses.replace(config.process, **sizes)
    return Denoiser(architecture=config.model, vocab=tokenizer.vocab), process


def build_loss(
    config: Config, module: Denoiser, process: Process, *, bound: bool = False, teacher: Bound | None = None
) -> LossFn:
    """The objective, as a function of the parameters. bound, teacher: see `objective_of`."""
    objective = objective_of(config, bound=bound, teacher=teacher)

    def loss(params, key, batch):
        return objective(Bound(module=module, params=params).denoise, process, key, batch)

    return loss


def objective_of(config: Config, *, bound: bool, teacher: Bound | None = None) -> Callable:
    """What is trained (by a teacher, if the objective has one); or the bound that evaluation reports, which is the same
    unless the objective has another (`types.Objective`). Called as an objective is; without teachers, equal configs'
    are equal. ValueError for a mixture that can't be."""
    objective = config.objective
    asked = objective.bound if bound and hasattr(objective, "bound") else objective
    if teacher is not None:
        asked = functools.partial(asked, teacher=teacher.denoise)
    if not config.model.self_conditioning:
        return asked
    if objective.canvas == 1 and objective.prefix is None:
        raise ValueError(f"{type(objective).__name__} denoises nothing: set model.self_conditioning=false")
    return SelfConditioned(asked)


def load_teacher(config: Config, tokenizer: Tokenizer) -> Bound | None:
    """The trained network that the objective learns from, as numbers that go with any mesh; None where it has none.

    ValueError unless it is of the same network, noise, objective and tokenizer.
    """
    if not isinstance(config.objective, Distillation):
        return None
    if not config.objective.teacher:
        raise ValueError("distillation needs a trained workdir: --set=objective.teacher=WORKDIR")
    teacher = load_for_inference(config.objective.teacher)
    learned = getattr(teacher.config.objective, "objective", teacher.config.objective)  # it may be a student itself
    same = {
        "model": config.model == teacher.config.model,
        "process": config.process == teacher.config.process,
        "objective.objective": config.objective.objective == learned,
        "tokenizer": tokenizer.fingerprint == teacher.tokenizer.fingerprint,
    }
    if other := [name for name, equal in same.items() if not equal]:
        raise ValueError(f"objective.teacher={config.objective.teacher} has another {', '.join(other)}: set them alike")
    return teacher.bound.replace(params=jax.device_get(teacher.bound.params))


def update_flops(config: Config, module: Denoiser, process: Process) -> int:
    """An update's useful operations, by the formula of `nn.flops`; not those of a teacher."""
    asked = config.objective.objective if isinstance(config.objective, Distillation) else config.objective

    def objective(denoise, key, batch):
        return asked(denoise, process, key, batch)

    return config.train.accumulate * flops.of_update(module, objective, abstract_batch(config))


def build_job(
    config: Config,
    text: Text | examples.Source,
    mesh: jax.sharding.Mesh,
    loss: LossFn,
    init: Callable,
    bound: LossFn | None = None,
) -> Job:
    """Everything jitted and laid out on the mesh. bound: what is evaluated; none: the loss."""
    init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    update, whole = build_update(config, mesh, loss, init), sharding.replicated(mesh)
    batches = _train_batches(config, text, mesh)
    # a row of the wrong length shows here
    jax.eval_shape(loss, update.abstract.params, train_key, abstract_batch(config))
    return Job(
        initial=lambda: update.initial(init_key),
        abstract=update.abstract,
        step=update.step,
        batches=batches,
        put=lambda batch: sharding.put_batch(mesh, batch, axis=1),
        evaluate=build_evaluate(config, text, mesh, bound or loss, eval_key),
        key=jax.jit(lambda key: key, out_shardings=whole)(train_key),
        meta=Meta(config=to_json(config), tokenizer=text.tokenizer.proto, corpus=text.fingerprint),
    )


def build_update(config: Config, mesh: jax.sharding.Mesh, loss: LossFn, init: Callable) -> Update:
    """The jitted update and its state's layout; runs nothing, so the mesh's devices need not be there."""
    train, optim = config.train, config.optim
    optimizer = optim.build(train.steps, jax.eval_shape(init, jax.random.key(0)))

    def initial(key):
        return train_state.initial(init, optimizer, train.ema > 0, key)

    boxed = jax.eval_shape(initial, jax.random.key(0))
    shardings, whole = sharding.state_shardings(mesh, boxed), sharding.replicated(mesh)
    step = make_steps(make_step(loss, optimizer, optim.rate(train.steps), accumulate=train.accumulate, ema=train.ema))
    return Update(
        initial=jax.jit(sharding.on(mesh, lambda key: train_state.unboxed(initial(key))), out_shardings=shardings),
        abstract=sharding.placed(train_state.unboxed(boxed), shardings),
        step=jax.jit(sharding.on(mesh, step), donate_argnums=0, out_shardings=(shardings, whole)),
    )


def _train_batches(config: Config, text: Text | examples.Source, mesh: jax.sharding.Mesh) -> Iterator[Batch]:
    """This host's rows of each batch."""
    rows = config.train.batch
    mine = sharding.rows_here(mesh, rows)
    return text.train_batches(length=config.data.length, batch=rows, seed=config.seed, mine=mine)


def _valid_batches(config: Config, text: Text | examples.Source, mesh: jax.sharding.Mesh) -> list[Batch]:
    """This host's rows of the first train.eval_batches of what is held out."""
    rows = config.train.batch // config.train.accumulate
    mine = np.asarray(sharding.rows_here(mesh, rows))
    batches = text.valid_batches(length=config.data.length, batch=rows)
    return [jax.tree.map(lambda x: x[mine], b) for b in itertools.islice(batches, config.train.eval_batches)]


def build_evaluate(
    config: Config, text: Text | examples.Source, mesh: jax.sharding.Mesh, loss: LossFn, key: jax.Array
) -> Callable:
    """parameters -> nats per target of each part on train.eval_batches of held-out text, always with the same noise."""
    batches = _valid_batches(config, text, mesh)
    losses = jax.jit(sharding.on(mesh, loss), out_shardings=sharding.replicated(mesh))

    def evaluate(params) -> dict[str, float]:
        totals = {}
        for i, batch in enumerate(batches):
            for name, part in losses(params, jax.random.fold_in(key, i), sharding.put_batch(mesh, batch)).items():
                totals[name] = totals[name] + part if name in totals else part
        return {f"valid/{name}": float(total.mean) for name, total in totals.items()}

    return evaluate


def load_for_inference(workdir: Path | str, *, step: int | None = None, ema: bool = True) -> Model:
    """The network of a workdir's newest whole checkpoint, or of `step`; the averaged parameters where there are any.

    It lies on this process's first device. Raises FileNotFoundError, CheckpointError or ValueError with one line.
    """
    checkpoints = Checkpoints(workdir)
    found = checkpoints.meta(step)
    if found is None:
        raise FileNotFoundError(f"{checkpoints.folder} holds no checkpoint; train one with launch.train")
    config, tokenizer = from_json(found[1].config), Tokenizer.from_bytes(found[1].tokenizer)
    module, process = build_model(config, tokenizer)
    boxed = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = nn.meta.unbox(boxed)
    abstract = sharding.placed(abstract, jax.tree.map(lambda _: here, abstract))
    step, params = checkpoints.restore_params(abstract, step=step, ema=ema)
    return Model(config, tokenizer, process, Bound(module=module, params=params), step, found[1], {})


def check_workdir(workdir: Path | str) -> None:
    """Raises OSError with one line where nothing could be written; writes nothing itself."""
    workdir = Path(workdir).absolute()
    place = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"--workdir={workdir}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir={workdir}: no permission to write in {place}")


def check_config(config: Config, stored: Meta, where: Path) -> None:
    """Raises ValueError naming each field that makes the config another experiment than the checkpoint's."""
    # Through the config, so that fields that came later have what they stood for.
    before, now = _flat(to_json(from_json(stored.config))), _flat(to_json(config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    wrong = [f"{key}={now.get(key)} (it has {before.get(key)})" for key in changed if not key.startswith(FREE)]
    if wrong:
        raise ValueError(f"the config doesn't match {where}: {', '.join(wrong)}; set them back or use a new workdir")
    if changed:
        log.info("changed since %s: %s", where, ", ".join(f"{key}={now.get(key)}" for key in changed))


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}".lstrip(".")).items()}


def check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError unless every device that holds rows of its own gets as many, and parts of rows are equal."""
    ways, parts, train = sharding.row_ways(mesh), sharding.length_ways(mesh), config.train
    if config.data.length % parts:
        raise ValueError(
            f"data.length={config.data.length} can't be cut into {parts} equal parts; choose a multiple of it, or a "
            "mesh with less mesh.sequence"
        )
    if (train.batch // train.accumulate) % ways:
        raise ValueError(
            f"train.batch={train.batch} in train.accumulate={train.accumulate} parts can't be cut into rows for "
            f"{ways} devices; choose a batch that {ways * train.accumulate} divides, or a mesh with more mesh.tensor"
        )


def abstract_batch(config: Config) -> Batch:
    """The shapes of one part of a batch."""
    shape = (config.train.batch // config.train.accumulate, config.data.length)
    number, truth = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.bool_)
    return Batch(tokens=number, segments=number, positions=number, given=truth, target=truth)
