"""What to compute, as frozen dataclasses; files and typed overrides that make them; JSON and back."""

import dataclasses
import difflib
import importlib
import importlib.util
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusion_lm.data.source import DataSource
from diffusion_lm.models.transformer import Architecture
from diffusion_lm.objectives.base import Objective
from diffusion_lm.sharding import MeshShape
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW

PACKAGE = __name__.split(".")[0]
CLASS = "class"  # the key under which JSON names a dataclass, as module:Name


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text, and how it is cut.

    path       python-docs, python-source, a file, a folder or a glob (`corpora.corpus`)
    document_unit    what a document is
    field      the key of a JSONL row that holds the text
    seq_len          positions of a row
    val_fraction     the share of documents kept from training
    tokenizer  a SentencePiece model to use; none: one of `vocab_size` pieces is trained, of `tokenizer_kind`
    token_cache_dir  a folder to keep the tokens in, for corpora that are large; none: they are kept in memory
    """

    path: str
    document_unit: Literal["file", "line", "paragraph"] = "file"
    field: str = "text"
    seq_len: int = 256
    val_fraction: float = 0.1
    tokenizer: str | None = None
    vocab_size: int = 8192
    tokenizer_kind: Literal["unigram", "char"] = "unigram"
    token_cache_dir: str | None = None

    def __post_init__(self):
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len must be at least 2; got {self.seq_len}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction is a share, in [0, 1); got {self.val_fraction}")
        if self.vocab_size < 1:
            raise ValueError(f"data.vocab_size must be positive; got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    data: DataSource
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
        if self.checkpoint.save_every % self.train.steps_per_call:
            raise ValueError(f"train.steps_per_call={self.train.steps_per_call} doesn't divide checkpoint.save_every")


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
