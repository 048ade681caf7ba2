"""From a config to what runs, and from a workdir to a network that can be asked: the only assembler."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from diffusion_lm import sharding
from diffusion_lm.config import Config, allowed_by, decode, encode, from_json, to_json
from diffusion_lm.data.source import TokenizedCorpus, TokenizedData
from diffusion_lm.data.tokenizer import Tokenizer
from diffusion_lm.models import flops
from diffusion_lm.models.base import Vocabulary
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.objectives.learned_noise import LearnedNoise
from diffusion_lm.objectives.self_conditioning import SelfConditionedObjective
from diffusion_lm.processes.base import Process
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.processes.state_dependent import LearnedMasking, StateDependentMasking
from diffusion_lm.training import state as train_state
from diffusion_lm.training.checkpoint import CheckpointMeta, Checkpoints
from diffusion_lm.training.loop import TrainLoop
from diffusion_lm.training.step import LossFn, make_step, make_steps
from diffusion_lm.types import Batch
from diffusion_lm.validation import check_config, check_kernel, check_rows, check_workdir, runnable


class LoadedModel(NamedTuple):
    """A trained network, ready to be asked."""

    config: Config
    tokenizer: Tokenizer
    process: Process
    network: BoundModel
    step: int
    meta: CheckpointMeta
    ready: dict  # networks made ready to sample, by their products' type: rounding a large one takes a while

    def for_sampling(self, rows: int) -> BoundModel:
        """`Bound.for_sampling`, once."""
        compute_dtype = self.network.sampling_dtype(rows)
        if compute_dtype not in self.ready:
            self.ready[compute_dtype] = self.network.for_sampling(rows)
        return self.ready[compute_dtype]


class CompiledUpdate(NamedTuple):
    """What a run repeats, laid out on a mesh; nothing of it has run yet.

    initial   key -> the state before the first step, jitted
    abstract  its shapes and shardings
    step      (state, key, batches [S, B, L]) -> state, metrics [S], jitted; donates the state
    """

    initial: Callable
    abstract: train_state.TrainState
    step: Callable


class Experiment(NamedTuple):
    """All that `training.loop.run` takes, and what else a launcher may want to look at."""

    config: Config
    job: TrainLoop
    checkpoints: Checkpoints
    text: TokenizedData
    module: Transformer
    process: Process


def build(config: Config, workdir: Path | str) -> Experiment:
    """Reads the text, and the workdir's checkpoint where there is one; writes nothing.

    Raises ValueError, OSError or CheckpointError with one line: whatever is wrong with config, text, mesh or
    checkpoint is said here, before the first step.
    """
    check_workdir(workdir)
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    check_kernel(config, mesh)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    stored = checkpoints.meta()
    if stored is not None:
        check_config(config, stored[1], checkpoints.path(stored[0]))
    text = read_data(config, stored and stored[1])
    module, process = build_model(config, text.tokenizer)
    teacher = load_teacher(config, text.tokenizer)
    loss, bound = build_loss(config, module, process), build_loss(config, module, process, bound=True)
    job = build_job(config, text, mesh, loss, build_init(module, process), bound=bound, teacher=teacher)
    job = dataclasses.replace(job, flops=functools.cache(lambda: update_flops(config, module, process)))
    return Experiment(config, job, checkpoints, text, module, process)


def read_data(config: Config, stored: CheckpointMeta | None = None) -> TokenizedData:
    """Opens what a config trains on. Raises ValueError if it isn't what the checkpoint `stored` was trained on."""
    if stored is None:
        return config.data.open(config.objective.layout)
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
    """The network and the noise for a tokenizer's pieces and its mask."""
    sizes = {"mask": tokenizer.mask}
    if isinstance(config.process, Gaussian):
        sizes["width"] = config.model.width
    process = dataclasses.replace(config.process, **sizes)
    vocabulary = config.model.vocabulary or Vocabulary(
        size=tokenizer.vocab, mask=tokenizer.mask, eos=tokenizer.eos, bos=tokenizer.bos
    )
    return Transformer(config.model, vocabulary, config.exec), process


def build_init(module: Transformer, process: Process) -> Callable:
    """key -> fresh parameters, boxed with their logical axes: the network's, and the process's if it learns any."""
    learned = {"noise": process.fresh()} if isinstance(process, LearnedMasking) else {}
    return lambda key: init_params(module, key) | learned


def noise_of(process: Process, params: dict) -> Process:
    """The process, with what was learned of it."""
    return process.of(params["noise"]) if isinstance(process, LearnedMasking) else process


def build_loss(config: Config, module: Transformer, process: Process, *, bound: bool = False) -> LossFn:
    """The objective, as a function of the parameters; behind the batch, of a teacher if it has one. bound: see
    `objective_of`."""
    objective = objective_of(config, bound=bound)

    def loss(params, key, batch, teacher: BoundModel | None = None):
        taught = {} if teacher is None else {"teacher": teacher.denoise}
        return objective(
            BoundModel(module=module, params=params).denoise, noise_of(process, params), key, batch, **taught
        )

    return loss


def objective_of(config: Config, *, bound: bool) -> Callable:
    """What is trained; or the bound that evaluation reports, which is the same unless the objective has another
    (`types.Objective`). Called as an objective is; equal configs' are equal. ValueError for a mixture that can't be."""
    objective = config.objective
    if isinstance(config.process, LearnedMasking) != isinstance(
        getattr(objective, "objective", objective), LearnedNoise
    ):
        raise ValueError("process=LearnedMasking() and objective=LearnedNoise() need each other: set both, or neither")
    if not config.model.self_conditioning:
        return objective.elbo if bound else objective
    if not objective.layout.denoises:
        raise ValueError(f"{type(objective).__name__} denoises nothing: set model.self_conditioning=false")
    wrapped = SelfConditionedObjective(objective)
    return wrapped.elbo if bound else wrapped


def load_teacher(config: Config, tokenizer: Tokenizer) -> BoundModel | None:
    """The trained network that the objective learns from, its numbers on the host; None where it has none.

    ValueError unless it is of the same network, noise, objective and tokenizer.
    """
    if not isinstance(config.objective, Distillation):
        return None
    if not config.objective.teacher:
        raise ValueError("distillation needs a trained workdir: --set=objective.teacher=WORKDIR")
    teacher = load_for_inference(config.objective.teacher, allow_import=allowed_by(config))
    learned = getattr(teacher.config.objective, "objective", teacher.config.objective)  # it may be a student itself
    same = {
        "model": config.model == teacher.config.model,
        "process": config.process == teacher.config.process,
        "objective.objective": config.objective.objective == learned,
        "tokenizer": tokenizer.fingerprint == teacher.tokenizer.fingerprint,
    }
    if other := [name for name, equal in same.items() if not equal]:
        raise ValueError(f"objective.teacher={config.objective.teacher} has another {', '.join(other)}: set them alike")
    return teacher.network.replace(params=jax.device_get(teacher.network.params))


def update_flops(config: Config, module: Transformer, process: Process) -> int:
    """An update's useful operations, by the formula of `nn.flops`."""
    noise = process.of(process.fresh()) if isinstance(process, LearnedMasking) else process

    def objective(denoise, teacher, key, batch):
        taught = {"teacher": teacher} if isinstance(config.objective, Distillation) else {}
        return config.objective(denoise, noise, key, batch, **taught)

    return config.train.grad_accum_steps * flops.of_update(module, objective, abstract_batch(config))


def build_job(
    config: Config,
    text: TokenizedData,
    mesh: jax.sharding.Mesh,
    loss: LossFn,
    init: Callable,
    bound: LossFn | None = None,
    teacher: BoundModel | None = None,
) -> TrainLoop:
    """Everything jitted and laid out on the mesh. bound: what is evaluated; none: the loss. teacher: whom the loss
    learns from."""
    init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    update, whole = build_update(config, mesh, loss, init, teacher), sharding.replicated(mesh)
    batches = _train_batches(config, text, mesh)
    # a row of the wrong length shows here
    jax.eval_shape(
        loss, update.abstract.params, train_key, abstract_batch(config), *(() if teacher is None else (teacher,))
    )
    return TrainLoop(
        initial=lambda: update.initial(init_key),
        abstract=update.abstract,
        step=update.step,
        batches=batches,
        put=lambda batch: sharding.put_batch(mesh, batch, axis=1),
        evaluate=build_evaluate(config, text, mesh, bound or loss, eval_key),
        key=jax.jit(lambda key: key, out_shardings=whole)(train_key),
        meta=CheckpointMeta(config=to_json(config), tokenizer=encode(text.tokenizer), corpus=text.fingerprint),
    )


def build_update(
    config: Config, mesh: jax.sharding.Mesh, loss: LossFn, init: Callable, teacher: BoundModel | None = None
) -> CompiledUpdate:
    """The jitted update and its state's layout; runs nothing, so the mesh's devices need not be there, but for a
    teacher's parameters: those go there, for the state to begin with and for each update to be handed."""
    train, optim = config.train, config.optim
    optimizer = optim.build(train.steps, jax.eval_shape(init, jax.random.key(0)))

    def initial(key, *teacher):
        begin = functools.partial(_boxed_as, init, *teacher) if teacher else init
        return train_state.initial(begin, optimizer, train.ema_decay > 0, key)

    def steps(state, key, batches, *teacher):
        asked = functools.partial(_behind, loss, *teacher) if teacher else loss
        step = make_step(
            asked, optimizer, optim.rate(train.steps), grad_accum_steps=train.grad_accum_steps, ema=train.ema_decay
        )
        return make_steps(step)(state, key, batches)

    boxed = jax.eval_shape(initial, jax.random.key(0))
    shardings, whole = sharding.state_shardings(mesh, boxed), sharding.replicated(mesh)
    abstract = sharding.placed(train_state.unboxed(boxed), shardings)
    first = sharding.on(mesh, lambda key, *teacher: train_state.unboxed(initial(key, *teacher)))
    first = jax.jit(first, out_shardings=shardings)
    step = jax.jit(sharding.on(mesh, steps), donate_argnums=0, out_shardings=(shardings, whole))
    if teacher is None:
        return CompiledUpdate(initial=first, abstract=abstract, step=step)
    teacher = teacher.replace(params=jax.device_put(teacher.params, shardings.params))
    return CompiledUpdate(
        initial=lambda key: first(key, teacher),
        abstract=abstract,
        step=lambda state, key, batches: step(state, key, batches, teacher),
    )


def _boxed_as(init: Callable, teacher: BoundModel, key: jax.Array) -> dict:
    """The teacher's parameters, boxed with their logical axes as `init` has fresh ones."""
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    put = lambda fresh, known: fresh.replace_boxed(known) if is_box(fresh) else known  # noqa: E731
    return jax.tree.map(put, init(key), teacher.params, is_leaf=is_box)


def _behind(loss: LossFn, teacher: BoundModel, params, key: jax.Array, batch: Batch):
    return loss(params, key, batch, teacher)


def _train_batches(config: Config, text: TokenizedData, mesh: jax.sharding.Mesh) -> Iterator[Batch]:
    """This host's rows of each batch."""
    rows = config.train.batch_size
    mine = sharding.rows_here(mesh, rows)
    return text.train_batches(length=config.data.seq_len, batch=rows, seed=config.seed, mine=mine)


def _valid_batches(config: Config, text: TokenizedData, mesh: jax.sharding.Mesh) -> list[Batch]:
    """This host's rows of the first train.eval_batches of what is held out."""
    rows = config.train.batch_size // config.train.grad_accum_steps
    mine = np.asarray(sharding.rows_here(mesh, rows))
    batches = text.valid_batches(length=config.data.seq_len, batch=rows)
    return [jax.tree.map(lambda x: x[mine], b) for b in itertools.islice(batches, config.train.eval_batches)]


def build_evaluate(
    config: Config, text: TokenizedData, mesh: jax.sharding.Mesh, loss: LossFn, key: jax.Array
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


def load_for_inference(
    workdir: Path | str, *, step: int | None = None, ema: bool = True, allow_import: Sequence[str] = ()
) -> LoadedModel:
    """The network of a workdir's newest whole checkpoint, or of `step`; the averaged parameters where there are any.

    It lies on this process's first device. Raises FileNotFoundError, CheckpointError or ValueError with one line.
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
    boxed = jax.eval_shape(build_init(module, process), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(device)
    abstract = nn.meta.unbox(boxed)
    abstract = sharding.placed(abstract, jax.tree.map(lambda _: here, abstract))
    step, params = checkpoints.restore_params(abstract, step=step, ema=ema)
    process = noise_of(process, params)
    if isinstance(
        process, StateDependentMasking
    ):  # as numbers: a sampler, which holds the process, is a static argument
        process = dataclasses.replace(process, powers=tuple(np.asarray(process.powers, np.float64).tolist()))
    return LoadedModel(config, tokenizer, process, BoundModel(module=module, params=params), step, found[1], {})


def abstract_batch(config: Config) -> Batch:
    """The shapes of one part of a batch."""
    shape = (config.train.batch_size // config.train.grad_accum_steps, config.data.seq_len)
    number, truth = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.bool_)
    return Batch(tokens=number, segment_ids=number, positions=number, context_mask=truth, loss_mask=truth)
