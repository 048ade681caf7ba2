"""A config or a workdir as a network: its parameters fresh, begun with another's, or loaded; its losses."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from diffusion_lm import sharding
from diffusion_lm.config import Config, allowed_by, decode, from_json
from diffusion_lm.data.tokenizer import Tokenizer
from diffusion_lm.models.base import FromInit, Vocabulary
from diffusion_lm.models.bound_model import BoundModel, stacked, stored, unstacked
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.models.warm_start import WarmStart, warm_start
from diffusion_lm.nn.lora import MASK, LoRA
from diffusion_lm.nn.specs import ExpertsSpec
from diffusion_lm.objectives.learned_noise import LearnedNoise
from diffusion_lm.objectives.self_conditioning import SelfConditionedObjective
from diffusion_lm.processes.base import Process
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.training.adapters import adapters_of, joined
from diffusion_lm.training.checkpoint import CheckpointMeta, Checkpoints
from diffusion_lm.training.step import LossFn, Stages
from diffusion_lm.training.update import Constants, InitFn
from diffusion_lm.types import Batch, Loss
from diffusion_lm.validation import runnable

log = logging.getLogger(__name__)
Array = jax.Array
BASE = "base"  # the constant that adapters are trained beside


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


def resolve(config: Config, other: dict | None) -> Config:
    """The config with `model=FromInit()` replaced by the network of another config, as JSON. Raises ValueError without
    one."""
    if not isinstance(config.model, FromInit):
        return config
    if other is None:
        raise ValueError("model=FromInit() is the network of another run: --set=train.init=WORKDIR")
    model, shift = from_json(other, allowed_by(config)).model, config.model.logit_shift
    model = model if shift is None else dataclasses.replace(model, logit_shift=shift)
    return dataclasses.replace(config, model=model)


def build_model(config: Config, tokenizer: Tokenizer) -> tuple[Transformer, Process]:
    """The network, and the process for the tokenizer's ids and the network's width."""
    process = config.process.sized(mask=tokenizer.mask, width=config.model.width)
    vocabulary = config.model.vocabulary or Vocabulary(
        size=tokenizer.vocab, mask=tokenizer.mask, eos=tokenizer.eos, bos=tokenizer.bos
    )
    lora = config.trainable if isinstance(config.trainable, LoRA) else None
    return Transformer(config.model, vocabulary, config.exec, lora=lora), process


def build_init(module: Transformer, process: Process, start: WarmStart | None = None) -> InitFn:
    """Makes the initialiser of what is trained: the network's parameters, and the process's if it has any.

    They begin with those of the constant "init", as `start` says; without it a student begins as the constant
    "teacher". Of a network with adapters only these are trained.
    """
    learned = process.init_params()

    def init(key: Array, constants: Constants) -> Any:
        boxed = init_params(module, key) | ({"noise": learned} if learned else {})
        if module.lora is not None:
            boxed = adapters_of(boxed)
            vector = boxed[MASK].unbox() if start is None else start.mask_vector(constants[BASE]["embedding"])
            return boxed | {MASK: boxed[MASK].replace_boxed(vector)}
        if start is not None:
            return sharding.reboxed(boxed, start.fill(nn.meta.unbox(boxed), constants["init"].params))
        return sharding.reboxed(boxed, constants["teacher"].params) if "teacher" in constants else boxed

    return init


def begin_with(config: Config, module: Transformer, process: Process, base: LoadedModel) -> WarmStart:
    """How the network, without its adapters, begins with the parameters of `base`; logs the table.

    Raises ValueError if they don't fit.
    """
    own, theirs = (
        nn.meta.unbox(jax.eval_shape(build_init(*parts), jax.random.key(0), {}))
        for parts in ((module.clone(lora=None), process), build_model(base.config, base.tokenizer))
    )
    # Whether the base was ever given a mask: else its row of the table is whatever it was drawn as.
    trained_by, masks = base.config.objective, not isinstance(base.process, Uniform | Gaussian)
    given_masks = masks and (trained_by.layout.denoises or trained_by.draft_length > 0)
    spec, context = module.spec, module.spec.learned_positions
    try:
        if context and config.data.seq_len > context:
            raise ValueError(f"has {context} learned positions: set data.seq_len to as many at most")
        start = warm_start(spec, module.vocabulary, own, base.config.model, theirs, fresh_mask=not given_masks)
        if module.lora is not None:
            _check_adapters(config, start)
    except ValueError as error:
        raise ValueError(f"train.init={config.train.init} {error}") from None
    log.info("begins with %s, step %d (%s)\n%s", config.train.init, base.step, type(trained_by).__name__, start.table())
    return start


def _check_adapters(config: Config, start: WarmStart) -> None:
    lora, layers = config.trainable, [group.layer for group in config.model.groups]
    if start.fresh:
        raise ValueError(
            f"lacks {'/'.join(min(start.fresh))}, which adapters leave as it was drawn: set trainable=Full()"
        )
    objective, name = config.objective, type(config.objective).__name__
    if lora.where == "noisy" and not (objective.layout.denoises or objective.draft_length):
        raise ValueError(f"with {name} has no noisy positions, where adapters would act: set trainable.where=all")
    if {"gate_up", "down"} & {*lora.targets} and any(isinstance(layer.mlp, ExpertsSpec) for layer in layers):
        raise ValueError("has experts, which have no adapters: set trainable.targets=query,key_value,output")


def frozen_base(base: LoadedModel, start: WarmStart, mesh: jax.sharding.Mesh) -> dict:
    """The parameters that adapters are trained beside, on the mesh, in the types that the workdir stores."""
    return start.shared(laid_out(base, mesh).params)


def load_base(config: Config, fingerprint: str | None = None) -> LoadedModel:
    """The model of `train.init`. Raises ValueError, FileNotFoundError or CheckpointError with one line if it is gone,
    or isn't what it was when it had this fingerprint."""
    path, checkpoints = config.train.init, Checkpoints(config.train.init)
    if fingerprint is not None and not checkpoints.steps():
        raise FileNotFoundError(f"the adapters' base {path} is gone: put it back there, or a link to it")
    base = load_for_inference(path, allow_import=allowed_by(config))
    if fingerprint not in (None, checkpoints.fingerprint(base.step)):
        raise ValueError(f"the adapters' base {path} has changed since they were trained: put back what it was")
    if base.network.module.lora is not None:
        raise ValueError(
            f"train.init={path} holds adapters: fold them into their base first, with launch.convert --merge"
        )
    return base


def laid_out(model: LoadedModel, mesh: jax.sharding.Mesh) -> BoundModel:
    """A loaded network on a mesh, its layers stacked as in training."""
    module, process = build_model(model.config, model.tokenizer)
    shardings = sharding.state_shardings(mesh, jax.eval_shape(build_init(module, process), jax.random.key(0), {}))
    params = model.network.params if model.network.module.scan else stacked(model.network.params, module.spec)
    return BoundModel(module=module, params=jax.device_put(jax.device_get(params), shardings))


def _network(module: Transformer, params: dict, constants: Constants) -> BoundModel:
    return BoundModel(module=module, params=joined(constants[BASE], params) if BASE in constants else params)


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


def build_loss(config: Config, module: Transformer, process: Process) -> LossFn | Stages:
    """The training loss, as a function of parameters and constants; several where the objective has stages."""

    def loss_of(objective: Any) -> LossFn:
        chosen = objective_of(dataclasses.replace(config, objective=objective))

        def loss(params, key, batch, constants):
            frozen = {name: constants[name].denoise for name in objective.frozen}
            denoise = _network(module, params, constants).denoise
            return chosen(denoise, process.with_params(params.get("noise")), key, batch, **frozen)

        return loss

    ends, losses = zip(*[(end, loss_of(objective)) for end, objective in config.objective.stages()], strict=True)
    if len(losses) == 1:
        return losses[0]
    return Stages(ends=tuple(round(end * config.train.steps) for end in ends[:-1]), losses=losses)


def build_elbo(config: Config, module: Transformer, process: Process) -> LossFn:
    """The negative log likelihood or its bound: what evaluation reports."""
    objective = objective_of(config)

    def elbo(params, key, batch, constants):
        denoise = _network(module, params, constants).denoise
        return objective.elbo(denoise, process.with_params(params.get("noise")), key, batch)

    return elbo


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
    base = None if module.lora is None else load_base(config, found[1].base)
    module = module.clone(scan=found[1].source is None)
    abstract = nn.meta.unbox(jax.eval_shape(build_init(module, process), jax.random.key(0), {}))
    here = jax.sharding.SingleDeviceSharding(device)
    abstract = sharding.placed(abstract, jax.tree.map(lambda _: here, abstract))
    if not module.scan:
        abstract = stored(abstract, config.exec.compute_dtype)
    step, params = checkpoints.restore_params(abstract, step=step, ema=ema)
    if base is not None:
        module = module.clone(scan=base.network.module.scan)
        params = joined(base.network.params, params if module.scan else unstacked(params))
    process = process.with_params(params.get("noise")).as_static()
    return LoadedModel(config, tokenizer, process, BoundModel(module=module, params=params), step, found[1], {})
