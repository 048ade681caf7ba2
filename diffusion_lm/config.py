"""What to compute, as frozen dataclasses; typed overrides; JSON and back; and `build`, the only assembler."""

import dataclasses
import difflib
import importlib
import importlib.util
import itertools
import logging
import os
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from diffusion_lm import sharding
from diffusion_lm.data import corpora, loader
from diffusion_lm.data.tokenizer import Tokenizer, train_tokenizer
from diffusion_lm.nn.bound import Bound
from diffusion_lm.nn.denoiser import Architecture, Denoiser, init_params
from diffusion_lm.processes.base import Process
from diffusion_lm.sharding import MeshShape
from diffusion_lm.training import state as train_state
from diffusion_lm.training.checkpoint import CheckpointError, Checkpointing, Checkpoints, Meta
from diffusion_lm.training.loop import Job, Train
from diffusion_lm.training.optimizer import AdamW
from diffusion_lm.training.step import LossFn, make_step, make_steps
from diffusion_lm.types import Batch, Objective

log = logging.getLogger(__name__)

PACKAGE = __name__.split(".")[0]
CLASS = "class"  # the key under which JSON names a dataclass, as module:Name


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text, and how it is cut.

    path       python-docs, python-source, a file, a folder or a glob (`corpora.corpus`)
    documents  what a document is
    field      the key of a JSONL row that holds the text
    length     positions of a row
    holdout    the share of documents kept from training
    tokenizer  a SentencePiece model to use; none: one of `vocab` pieces is trained, of `kind`
    cache      a folder to keep the tokens in, for corpora that are large; none: they are kept in memory
    """

    path: str
    documents: Literal["file", "line", "paragraph"] = "file"
    field: str = "text"
    length: int = 256
    holdout: float = 0.1
    tokenizer: str | None = None
    vocab: int = 8192
    kind: Literal["unigram", "char"] = "unigram"
    cache: str | None = None

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(f"data.length must be at least 2; got {self.length}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"data.holdout is a share, in [0, 1); got {self.holdout}")
        if self.vocab < 1:
            raise ValueError(f"data.vocab must be positive; got {self.vocab}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    data: Data
    model: Architecture
    process: Any
    objective: Objective
    optim: AdamW = field(default_factory=AdamW)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    mesh: MeshShape = field(default_factory=MeshShape)
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32); got {self.seed}")
        if self.checkpoint.every % self.train.steps_per_call:
            raise ValueError(f"train.steps_per_call={self.train.steps_per_call} doesn't divide checkpoint.every")


# ---- from a file, from the command line ----


def load(path: str) -> Config:
    """The Config that a file's get_config() returns; 'FILE.py:ARGUMENT' hands it one argument.

    Raises FileNotFoundError or ValueError with one line.
    """
    name, _, argument = path.partition(":")
    if not Path(name).is_file():
        raise FileNotFoundError(f"no config file {name}; see configs/ for those that come along")
    config = _run_file(name, [argument] if argument else [])
    if not isinstance(config, Config):
        raise ValueError(f"get_config() of {name} returned {type(config).__name__}, not a diffusion_lm.config.Config")
    return _fit(config, Config, "config")


def _run_file(name: str, arguments: list[str]) -> Any:
    spec = importlib.util.spec_from_file_location(f"_config_{Path(name).stem}", name)
    if spec is None:
        raise ValueError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(f"{name} defines no get_config()")
        return module.get_config(*arguments)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name} can't be run: {type(error).__name__}: {error}") from error


def override(config: Config, assignments: Sequence[str]) -> Config:
    """The config with 'optim.lr=1e-3' and the like applied together. Raises ValueError naming key, type and value."""
    changes: dict = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE; got {assignment!r}")
        group, owner = changes, config
        *groups, last = key.strip().split(".")
        for part in groups:
            owner = getattr(owner, _known(owner, part, key, config))
            group = group.setdefault(part, {})
            if not dataclasses.is_dataclass(owner):
                raise ValueError(f"{key}: {part} is a {type(owner).__name__}, it has no fields")
        hint = _hints(type(owner))[_known(owner, last, key, config)]
        if dataclasses.is_dataclass(getattr(owner, last)):
            fields = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(getattr(owner, last)))
            raise ValueError(f"{key} is a group of fields; set one of {fields}")
        group[last] = _parse(text.strip(), hint, key.strip())
    return _replaced(config, changes)


def _replaced(owner: Any, changes: dict) -> Any:
    """All changes to a dataclass at once, so that its checks see no half-changed state."""
    return dataclasses.replace(
        owner,
        **{
            name: _replaced(getattr(owner, name), value) if isinstance(value, dict) else value
            for name, value in changes.items()
        },
    )


def _known(owner: Any, name: str, key: str, config: Config) -> str:
    if name in {f.name for f in dataclasses.fields(owner)}:
        return name
    known = list(_keys(config))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    # The same last word in another group is more likely meant than a similar spelling.
    same = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    raise ValueError(f"unknown key {key}; did you mean {(same or near)[0]}?")


def _keys(owner: Any, prefix: str = "") -> typing.Iterator[str]:
    for f in dataclasses.fields(owner):
        value = getattr(owner, f.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _parse(text: str, hint: Any, key: str) -> Any:
    """Text from the command line as the type that the field declares."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _chosen(text, {str(choice): choice for choice in args}, key)
    if hint is bool:
        return _chosen(text.lower(), {"true": True, "false": False}, key)
    if hint is type(None) or (type(None) in args and text.lower() == "none"):
        return _chosen(text.lower(), {"none": None}, key)
    if origin in (typing.Union, types.UnionType):
        return _parse(text, next(arg for arg in args if arg is not type(None)), key)
    if origin is tuple:
        return tuple(_parse(part.strip(), args[0], key) for part in text.split(",") if part.strip())
    if hint in (int, float, str):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"{key} takes {_name(hint)}; got {text!r}") from None
    raise ValueError(f"{key} takes {_name(hint)}, which can't be set from the command line")


def _chosen(text: str, choices: dict[str, Any], key: str) -> Any:
    if text not in choices:
        raise ValueError(f"{key} takes one of {', '.join(choices)}; got {text!r}")
    return choices[text]


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


# ---- JSON ----


def to_json(value: Any) -> Any:
    """Dicts, lists and plain values; a dataclass says its class as module:Name."""
    if dataclasses.is_dataclass(value):
        cls = type(value)
        rest = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {CLASS: f"{cls.__module__}:{cls.__qualname__}", **rest}
    return [to_json(v) for v in value] if isinstance(value, tuple) else value


def from_json(value: dict) -> Config:
    """The inverse of to_json. Raises ValueError on a class outside this package, an unknown field, a wrong type."""
    return _fit(_unjson(value, "config"), Config, "config")


def _unjson(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return tuple(_unjson(v, key) for v in value)
    if not isinstance(value, dict):
        return value
    cls = _class(value.get(CLASS), key)
    fields = {name: _unjson(v, f"{key}.{name}") for name, v in value.items() if name != CLASS}
    if unknown := sorted(set(fields) - {f.name for f in dataclasses.fields(cls)}):
        raise ValueError(f"{key} of class {cls.__name__} has no field {', '.join(unknown)}")
    hints = _hints(cls)
    try:
        return cls(**{name: _fit(v, hints[name], f"{key}.{name}") for name, v in fields.items()})
    except TypeError as error:
        raise ValueError(f"{key} of class {cls.__name__}: {error}") from None


def _class(name: Any, key: str) -> type:
    """The dataclass 'module:Name' of this package, and of no other."""
    module, _, cls = name.partition(":") if isinstance(name, str) else ("", "", "")
    found = None
    if module.split(".")[0] == PACKAGE and importlib.util.find_spec(module) is not None:
        found = getattr(importlib.import_module(module), cls, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and found.__module__ == module):
        raise ValueError(f"{key}: {name!r} is not a dataclass of {PACKAGE}, as module:Name")
    return found


def _fit(value: Any, hint: Any, key: str) -> Any:
    """The value, its types checked all the way down. Whole numbers become floats where those are declared."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(value) and _may_stand(value, hint):
        hints = _hints(type(value))
        fields = {
            f.name: _fit(getattr(value, f.name), hints[f.name], f"{key}.{f.name}") for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    if origin in (typing.Union, types.UnionType):
        hint = next((arg for arg in args if type(value) is arg), args[0])
        return _fit(value, hint, key)
    if origin is tuple and isinstance(value, tuple):
        return tuple(_fit(v, args[0], key) for v in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or (origin is Literal and value in args) or (isinstance(hint, type) and type(value) is hint):
        return value
    raise ValueError(f"{key.removeprefix('config.')} takes {_name(hint)}; got {value!r}")


def _may_stand(value: Any, hint: Any) -> bool:
    """Whether a dataclass may stand in a field; where a protocol is asked for, any may."""
    return hint is Any or getattr(hint, "_is_protocol", False) or isinstance(value, hint)


# ---- from a config to what runs ----

# What may change between a checkpoint and the run that goes on from it; anything else would be another experiment.
FREE = ("train.steps", "train.log_every", "train.eval_every", "train.eval_batches", "train.steps_per_call",
        "train.accumulate", "checkpoint.", "mesh.", "optim.", "data.path", "data.tokenizer", "data.cache")  # fmt: skip


class Text(NamedTuple):
    """A corpus as tokens, with what is held out (nothing where data.holdout is 0)."""

    tokenizer: Tokenizer
    train: loader.TokenArray
    valid: loader.TokenArray | None
    fingerprint: str


class Model(NamedTuple):
    """A trained network, ready to be asked."""

    config: Config
    tokenizer: Tokenizer
    process: Process
    bound: Bound
    step: int


class Run(NamedTuple):
    """All that `training.loop.run` takes, and what else a launcher may want to look at."""

    config: Config
    job: Job
    checkpoints: Checkpoints
    text: Text
    module: Denoiser
    process: Process


def build(config: Config, workdir: Path | str) -> Run:
    """Reads the text, and the workdir's checkpoint where there is one; writes nothing.

    Raises ValueError, OSError or CheckpointError with one line: whatever is wrong with config, text, mesh or
    checkpoint is said here, before the first step.
    """
    check_workdir(workdir)
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    stored = checkpoints.meta()
    if stored is not None:
        check_config(config, stored[1], checkpoints.path(stored[0]))
    text = read_text(config, stored and stored[1])
    module, process = build_model(config, text.tokenizer)
    job = build_job(config, text, mesh, build_loss(config, module, process), lambda key: init_params(module, key))
    return Run(config, job, checkpoints, text, module, process)


def read_text(config: Config, stored: Meta | None = None) -> Text:
    """The corpus in the tokenizer's pieces: the stored one, data.tokenizer, or one trained on the training part."""
    data = config.data
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
    process = dataclasses.replace(config.process, mask=tokenizer.mask)
    return Denoiser(architecture=config.model, vocab=tokenizer.vocab), process


def build_loss(config: Config, module: Denoiser, process: Process) -> LossFn:
    """The objective, as a function of the parameters."""

    def loss(params, key, batch):
        return config.objective(Bound(module=module, params=params).denoise, process, key, batch)

    return loss


def build_job(config: Config, text: Text, mesh: jax.sharding.Mesh, loss: LossFn, init: Callable) -> Job:
    """Everything jitted and laid out on the mesh."""
    train, optim = config.train, config.optim
    init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    optimizer = optim.build(train.steps, jax.eval_shape(init, init_key))

    def initial(key):
        return train_state.initial(init, optimizer, train.ema > 0, key)

    boxed = jax.eval_shape(initial, init_key)
    shardings, whole = sharding.state_shardings(mesh, boxed), sharding.replicated(mesh)
    abstract = sharding.placed(train_state.unboxed(boxed), shardings)
    fresh = jax.jit(sharding.on(mesh, lambda key: train_state.unboxed(initial(key))), out_shardings=shardings)
    step = make_steps(make_step(loss, optimizer, optim.rate(train.steps), accumulate=train.accumulate, ema=train.ema))
    batches = _train_batches(config, text)
    jax.eval_shape(loss, abstract.params, train_key, _abstract_batch(config))  # a row of the wrong length shows here
    return Job(
        initial=lambda: fresh(init_key),
        abstract=abstract,
        step=jax.jit(sharding.on(mesh, step), donate_argnums=0, out_shardings=(shardings, whole)),
        batches=batches,
        put=lambda batch: sharding.put_batch(mesh, batch, axis=1),
        evaluate=build_evaluate(config, text, mesh, loss, eval_key),
        key=jax.device_put(train_key, whole),
        meta=Meta(config=to_json(config), tokenizer=text.tokenizer.proto, corpus=text.fingerprint),
    )


def _train_batches(config: Config, text: Text):
    return loader.train_loader(
        text.train,
        length=config.data.length,
        batch=config.train.batch // jax.process_count(),
        seed=config.seed,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )


def _valid_batches(config: Config, tokens: loader.TokenArray | None) -> list[Batch]:
    """This host's rows of the first train.eval_batches of held-out text."""
    if tokens is None:
        return []
    rows = config.train.batch // config.train.accumulate
    mine = slice(*(rows * i // jax.process_count() for i in (jax.process_index(), jax.process_index() + 1)))
    batches = loader.eval_batches(tokens, length=config.data.length, batch=rows)
    return [jax.tree.map(lambda x: x[mine], b) for b in itertools.islice(batches, config.train.eval_batches)]


def build_evaluate(config: Config, text: Text, mesh: jax.sharding.Mesh, loss: LossFn, key: jax.Array) -> Callable:
    """parameters -> nats per target of each part on train.eval_batches of held-out text, always with the same noise."""
    batches = _valid_batches(config, text.valid)
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

    It lies on this process's first device. Raises CheckpointError or ValueError with one line.
    """
    checkpoints = Checkpoints(workdir)
    found = checkpoints.meta(step)
    if found is None:
        raise CheckpointError(f"{checkpoints.folder} holds no checkpoint; train one with launch.train")
    config, tokenizer = from_json(found[1].config), Tokenizer.from_bytes(found[1].tokenizer)
    module, process = build_model(config, tokenizer)
    boxed = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = nn.meta.unbox(boxed)
    abstract = sharding.placed(abstract, jax.tree.map(lambda _: here, abstract))
    step, params = checkpoints.restore_params(abstract, step=step, ema=ema)
    return Model(config, tokenizer, process, Bound(module=module, params=params), step)


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
    before, now = _flat(stored.config), _flat(to_json(config))
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


def _check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    ways, train = sharding.row_ways(mesh), config.train
    if (train.batch // train.accumulate) % ways:
        raise ValueError(
            f"train.batch={train.batch} in train.accumulate={train.accumulate} parts can't be cut into rows for "
            f"{ways} devices; choose a batch that {ways * train.accumulate} divides, or a mesh with more mesh.tensor"
        )


def _abstract_batch(config: Config) -> Batch:
    shape = (config.train.batch // config.train.accumulate, config.data.length)
    number, truth = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.bool_)
    return Batch(tokens=number, segments=number, positions=number, given=truth, target=truth)
