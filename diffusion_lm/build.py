"""Assembles a config into a training run, and a workdir into a network for sampling. No other file knows all parts."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from diffusion_lm import lock, sharding
from diffusion_lm.config import Config, allowed_by, decode, encode, from_json, to_json
from diffusion_lm.data.source import TokenizedCorpus, TokenizedData
from diffusion_lm.data.tokenizer import Tokenizer
from diffusion_lm.models import flops
from diffusion_lm.models.base import FromInit, Vocabulary
from diffusion_lm.models.bound_model import BoundModel, stacked, stored
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.models.warm_start import WarmStart, warm_start
from diffusion_lm.objectives.learned_noise import LearnedNoise
from diffusion_lm.objectives.self_conditioning import SelfConditionedObjective
from diffusion_lm.processes.base import Process
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.training.checkpoint import CheckpointMeta, Checkpoints
from diffusion_lm.training.loop import TrainLoop
from diffusion_lm.training.step import LossFn
from diffusion_lm.training.update import Constants, InitFn, build_update
from diffusion_lm.types import Batch, Loss
from diffusion_lm.validation import check_config, check_kernel, check_rows, check_workdir, runnable

log = logging.getLogger(__name__)
Array = jax.Array


class LoadedModel(NamedTuple):
    """A trained network from a workdir.

    `prepared` caches networks that are ready for sampling, by compute dtype: converting a large one takes a while.
    """

    config: Config
    tokenizer: Tokenizer
    process: Process
    network: BoundModel
    step: int
    meta: CheckpointMeta
    prepared: dict

    def for_sampling(self, rows: int) -> BoundModel:
        """`BoundModel.for_sampling`, cached."""
        compute_dtype = self.network.sampling_dtype(rows)
        if compute_dtype not in self.prepared:
            self.prepared[compute_dtype] = self.network.for_sampling(rows)
        return self.prepared[compute_dtype]

    def elbo(self) -> Callable[[Array, Batch], dict[str, Loss]]:
        """(key, batch) -> the objective's negative log likelihood or its bound, by part; jitted."""
        loss = jax.jit(build_elbo(self.config, self.network.module, self.process))
        return lambda key, batch: loss(self.network.params, key, batch, {})


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
    if config.train.init and stored is None:
        base = load_for_inference(config.train.init, allow_import=allowed_by(config))
    config = resolve(config, stored[1].config if stored else base and base.meta.config)
    if stored is not None:
        check_config(config, stored[1], checkpoints.path(stored[0]))
    data = read_data(config, stored and stored[1], base and base.tokenizer)
    module, process = build_model(config, data.tokenizer)
    losses = build_loss(config, module, process), build_elbo(config, module, process)
    constants = load_constants(config, data.tokenizer, module, process, mesh)
    start = None if base is None else begin_with(config, module, process, base)
    begun = {} if base is None else {"init": laid_out(base, mesh)}
    job = build_job(config, data, mesh, *losses, build_init(module, process, start), constants, begun)
    job = dataclasses.replace(job, flops=functools.cache(lambda: update_flops(config, module, process)))
    return Experiment(config, job, checkpoints, data, module, process)


def resolve(config: Config, other: dict | None) -> Config:
    """The config with `model=FromInit()` replaced by the network of another config, as JSON. Raises ValueError without
    one."""
    if not isinstance(config.model, FromInit):
        return config
    if other is None:
        raise ValueError("model=FromInit() is the network of another run: --set=train.init=WORKDIR")
    return dataclasses.replace(config, model=from_json(other, allowed_by(config)).model)


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


def build_model(config: Config, tokenizer: Tokenizer) -> tuple[Transformer, Process]:
    """The network, and the process for the tokenizer's ids and the network's width."""
    process = config.process.sized(mask=tokenizer.mask, width=config.model.width)
    vocabulary = config.model.vocabulary or Vocabulary(
        size=tokenizer.vocab, mask=tokenizer.mask, eos=tokenizer.eos, bos=tokenizer.bos
    )
    return Transformer(config.model, vocabulary, config.exec), process


def build_init(module: Transformer, process: Process, start: WarmStart | None = None) -> InitFn:
    """Makes the initialiser of what is trained: the network's parameters, and the process's if it has any.

    They begin with those of the constant "init", as `start` says; without it a student begins as the constant
    "teacher".
    """
    learned = process.init_params()

    def init(key: Array, constants: Constants) -> Any:
        boxed = init_params(module, key) | ({"noise": learned} if learned else {})
        if start is not None:
            return sharding.reboxed(boxed, start.fill(nn.meta.unbox(boxed), constants["init"].params))
        return sharding.reboxed(boxed, constants["teacher"].params) if "teacher" in constants else boxed

    return init


def begin_with(config: Config, module: Transformer, process: Process, base: LoadedModel) -> WarmStart:
    """How the network begins with the parameters of `base`; logs the table. Raises ValueError if they don't fit."""
    own, theirs = (
        nn.meta.unbox(jax.eval_shape(build_init(*parts), jax.random.key(0), {}))
        for parts in ((module, process), build_model(base.config, base.tokenizer))
    )
    # Whether the base was ever given a mask: else its row of the table is whatever it was drawn as.
    given_masks = base.config.objective.layout.denoises and not isinstance(base.process, Uniform | Gaussian)
    spec, context = module.spec, module.spec.learned_positions
    try:
        if context and config.data.seq_len > context:
            raise ValueError(f"has {context} learned positions: set data.seq_len to as many at most")
        start = warm_start(spec, module.vocabulary, own, base.config.model, theirs, fresh_mask=not given_masks)
    except ValueError as error:
        raise ValueError(f"train.init={config.train.init} {error}") from None
    trained_by = type(base.config.objective).__name__
    log.info("begins with %s, step %d (%s)\n%s", config.train.init, base.step, trained_by, start.table())
    return start


def laid_out(model: LoadedModel, mesh: jax.sharding.Mesh) -> BoundModel:
    """A loaded network on a mesh, its layers stacked as in training."""
    module, process = build_model(model.config, model.tokenizer)
    shardings = sharding.state_shardings(mesh, jax.eval_shape(build_init(module, process), jax.random.key(0), {}))
    params = model.network.params if model.network.module.scan else stacked(model.network.params, module.spec)
    return BoundModel(module=module, params=jax.device_put(jax.device_get(params), shardings))


def objective_of(config: Config) -> Any:
    """The config's objective, self-conditioned if the network is. Raises ValueError if its parts don't go together."""
    objective = config.objective
    learns_noise = isinstance(getattr(objective, "objective", objective), LearnedNoise)
    if bool(config.process.init_params()) != learns_noise:
        raise ValueError("process=LearnedMasking() and objective=LearnedNoise() need each other: set both, or neither")
    if not config.model.self_conditioning:
        return objective
    if not objective.layout.denoises:
        raise ValueError(f"{type(objective).__name__} denoises nothing: set model.self_conditioning=false")
    return SelfConditionedObjective(objective)


def build_loss(config: Config, module: Transformer, process: Process) -> LossFn:
    """The training loss, as a function of parameters and constants."""
    objective = objective_of(config)

    def loss(params, key, batch, constants):
        frozen = {name: network.denoise for name, network in constants.items()}
        denoise = BoundModel(module=module, params=params).denoise
        return objective(denoise, process.with_params(params.get("noise")), key, batch, **frozen)

    return loss


def build_elbo(config: Config, module: Transformer, process: Process) -> LossFn:
    """The negative log likelihood or its bound: what evaluation reports."""
    objective = objective_of(config)

    def elbo(params, key, batch, constants):
        denoise = BoundModel(module=module, params=params).denoise
        return objective.elbo(denoise, process.with_params(params.get("noise")), key, batch)

    return elbo


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
    """An update's useful operations, by the formula of `models.flops`."""
    process = process.with_params(process.init_params())

    def objective(denoise, teacher, key, batch):
        return config.objective(denoise, process, key, batch, **dict.fromkeys(config.objective.frozen, teacher))

    return config.train.grad_accum_steps * flops.of_update(module, objective, abstract_batch(config))


def abstract_batch(config: Config) -> Batch:
    """The shapes of one micro-batch."""
    shape = (config.train.batch_size // config.train.grad_accum_steps, config.data.seq_len)
    ids, flags = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.bool_)
    return Batch(tokens=ids, segment_ids=ids, positions=ids, context_mask=flags, loss_mask=flags)


def build_job(
    config: Config,
    data: TokenizedData,
    mesh: jax.sharding.Mesh,
    loss: LossFn,
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
    jax.eval_shape(loss, update.abstract.params, train_key, abstract_batch(config), constants)
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
            for name, part in parts.items():
                totals[name] = totals[name] + part if name in totals else part
        return {f"valid/{name}": float(total.mean) for name, total in totals.items()}

    return evaluate


def load_for_inference(
    workdir: Path | str, *, step: int | None = None, ema: bool = True, allow_import: Sequence[str] = ()
) -> LoadedModel:
    """Loads a workdir's network onto this process's first device.

    Args:
        workdir: of a training run.
        step: of the checkpoint; None: the newest that is whole.
        ema: take the moving average of the parameters, if the run kept one.
        allow_import: modules and packages of your own whose classes the checkpoint may name.

    Raises FileNotFoundError, CheckpointError or ValueError with one line.
    """
    checkpoints = Checkpoints(workdir)
    found = checkpoints.meta(step)
    if found is None:
        raise FileNotFoundError(f"{checkpoints.folder} holds no checkpoint; train one with launch.train")
    device = jax.local_devices()[0]
    config = from_json(found[1].config, allow_import)
    config = runnable(config, sharding.make_mesh(sharding.MeshShape(), [device]))
    tokenizer = decode(found[1].tokenizer, allow_import, "tokenizer")
    module, process = build_model(config, tokenizer)
    module = module.clone(scan=found[1].source is None)
    abstract = nn.meta.unbox(jax.eval_shape(build_init(module, process), jax.random.key(0), {}))
    here = jax.sharding.SingleDeviceSharding(device)
    abstract = sharding.placed(abstract, jax.tree.map(lambda _: here, abstract))
    if not module.scan:
        abstract = stored(abstract, config.exec.compute_dtype)
    step, params = checkpoints.restore_params(abstract, step=step, ema=ema)
    process = process.with_params(params.get("noise")).as_static()
    return LoadedModel(config, tokenizer, process, BoundModel(module=module, params=params), step, found[1], {})
