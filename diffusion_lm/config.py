"""Configs: frozen dataclasses that say what to compute, from a file and typed overrides, to JSON and back.

JSON records each dataclass as module:Class. Loading imports only this package and the modules that the user allows;
it never runs anything else from a file.
"""

import base64
import dataclasses
import difflib
import importlib
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusion_lm.data.source import Data, DataSource
from diffusion_lm.models.base import Execution, FromInit, ModelSpec, check_execution
from diffusion_lm.nn.lora import Full, LoRA
from diffusion_lm.objectives.base import Objective
from diffusion_lm.processes.base import Process
from diffusion_lm.sharding import MeshShape
from diffusion_lm.training.checkpoint import FORMAT, Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, Optimizer

__all__ = ["Config", "Data", "allowed_by", "decode", "encode", "find_class", "from_json", "load", "override", "to_json"]
PACKAGE = __name__.split(".")[0]
CLASS = "class"  # the key under which JSON names a dataclass, as module:Name
BYTES = "base64"  # the only key of bytes


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment. Every part may be a frozen dataclass of your own.

    data        what is trained on
    model       what the network is
    exec        how it runs
    trainable   what is trained: all parameters, or adapters beside those of train.init
    process     how tokens become noise
    objective   the loss
    optim       the optimizer and its learning rate
    train       updates, batch size, logging
    checkpoint  how often to save, and how many to keep
    mesh        how devices share the work
    seed        of parameters, order and noise, in [0, 2**32)
    """

    data: DataSource
    model: ModelSpec | FromInit
    process: Process
    objective: Objective
    exec: Execution = field(default_factory=Execution)
    trainable: Full | LoRA = field(default_factory=Full)
    optim: Optimizer = field(default_factory=AdamW)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    mesh: MeshShape = field(default_factory=MeshShape)
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32); got {self.seed}")
        check_execution(self.model, self.exec)
        if self.checkpoint.save_every % self.train.steps_per_call:
            raise ValueError(f"train.steps_per_call={self.train.steps_per_call} doesn't divide checkpoint.save_every")


# ---- from a file, from the command line ----


def load(path: str, allow_import: Sequence[str] = ()) -> Config:
    """Loads a config.

    Args:
      path: a Python file whose get_config() returns it; 'FILE.py:ARGUMENT' passes one argument. Or a .json file.
      allow_import: modules and packages beside this one whose classes a .json file may name.

    Raises FileNotFoundError or ValueError with one line.
    """
    name, _, argument = path.partition(":")
    if not Path(name).is_file():
        raise FileNotFoundError(f"no config file {name}; see configs/ for examples")
    if Path(name).suffix.lower() == ".json":
        try:
            return from_json(json.loads(Path(name).read_text(encoding="utf-8-sig")), allow_import)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    config = _run_file(Path(name), [argument] if argument else [])
    if not isinstance(config, Config):
        raise ValueError(f"get_config() of {name} returned {type(config).__name__}, not a diffusion_lm.config.Config")
    return _fit(config, Config, "config")


def _run_file(path: Path, arguments: list[str]) -> Any:
    try:
        module = _module_of(path)
        if not hasattr(module, "get_config"):
            raise ValueError(f"{path} defines no get_config()")
        return module.get_config(*arguments)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path} can't be run: {type(error).__name__}: {error}") from error


def _module_of(path: Path) -> types.ModuleType:
    """Imports a file under the name by which others import it, so that checkpoints can name classes defined in it."""
    path = path.resolve()
    for folder in (Path(entry).resolve() for entry in sys.path):
        parts = path.relative_to(folder).with_suffix("").parts if path.is_relative_to(folder) else ("-",)
        name = ".".join(parts)
        if path.suffix == ".py" and all(part.isidentifier() for part in parts) and _imports(name, path):
            return importlib.reload(sys.modules[name]) if name in sys.modules else importlib.import_module(name)
    free = path.stem not in sys.modules and importlib.util.find_spec(path.stem) is None
    spec = importlib.util.spec_from_file_location(path.stem if free else f"_config_{path.stem}", path)
    if spec is None:
        raise ValueError(f"{path} is not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _imports(name: str, path: Path) -> bool:
    """Whether importing `name` would run this file."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path


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
        hint = typing.get_type_hints(type(owner))[_known(owner, last, key, config)]
        if dataclasses.is_dataclass(getattr(owner, last)) and str not in typing.get_args(hint):
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
    # The same last word in another group is likelier than a similar spelling.
    same = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    raise ValueError(f"unknown key {key}; did you mean {(same or near)[0]}?")


def _keys(owner: Any, prefix: str = "") -> typing.Iterator[str]:
    for f in dataclasses.fields(owner):
        value = getattr(owner, f.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _parse(text: str, hint: Any, key: str) -> Any:
    """Text from the command line, as the type of the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _chosen(text, {str(choice): choice for choice in args}, key)
    if hint is bool:
        return _chosen(text.lower(), {"true": True, "false": False}, key)
    if hint is type(None) or (type(None) in args and text.lower() == "none"):
        return _chosen(text.lower(), {"none": None}, key)
    if origin in (typing.Union, types.UnionType):
        return _parse(text, next((arg for arg in args if arg in (str, int, float, bool)), args[0]), key)
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


def to_json(config: Config) -> dict:
    """The config as JSON, with the number of its format."""
    return {"format": FORMAT, **encode(config)}


def from_json(value: dict, allow_import: Sequence[str] = ()) -> Config:
    """The inverse of to_json; `allow_import` as in `load`.

    Raises ValueError for another format, a class that isn't allowed, an unknown field or a wrong type.
    """
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"the config or checkpoint has format {found}, and this version reads {FORMAT}: train again, or use the "
            "version that wrote it"
        )
    rest = {key: part for key, part in value.items() if key != "format"}
    return _fit(decode(rest, allow_import, "config"), Config, "config")


def allowed_by(config: Any) -> tuple[str, ...]:
    """The packages that define a config's classes: the user has imported them already."""
    if not dataclasses.is_dataclass(config):
        return ()
    parts = (allowed_by(getattr(config, f.name)) for f in dataclasses.fields(config))
    return tuple(dict.fromkeys([_module_name(type(config)).split(".")[0], *(name for part in parts for name in part)]))


def encode(value: Any) -> Any:
    """A dataclass as JSON: its class as module:Name, and its fields. Raises ValueError for what JSON can't hold."""
    if dataclasses.is_dataclass(value):
        cls = type(value)
        if "<locals>" in cls.__qualname__:
            raise ValueError(f"{cls.__qualname__} is defined inside a function: move it to the top of its file")
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {CLASS: f"{_module_name(cls)}:{cls.__qualname__}", **fields}
    if isinstance(value, tuple):
        return [encode(part) for part in value]
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"a config holds plain values, tuples and dataclasses; got {type(value).__name__} {value!r:.60}")


def decode(value: Any, allow_import: Sequence[str] = (), key: str = "value") -> Any:
    """The inverse of encode. `key` names the value in errors, which are ValueErrors."""
    if isinstance(value, list):
        return tuple(decode(part, allow_import, key) for part in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {BYTES}:
        return base64.b64decode(value[BYTES])
    cls = find_class(value.get(CLASS), allow_import, key)
    fields = {name: decode(part, allow_import, f"{key}.{name}") for name, part in value.items() if name != CLASS}
    if unknown := sorted(set(fields) - {f.name for f in dataclasses.fields(cls)}):
        raise ValueError(f"{key} of class {cls.__name__} has no field {', '.join(unknown)}")
    hints = typing.get_type_hints(cls)
    try:
        return cls(**{name: _fit(part, hints[name], f"{key}.{name}") for name, part in fields.items()})
    except TypeError as error:
        raise ValueError(f"{key} of class {cls.__name__}: {error}") from None


def _module_name(cls: type) -> str:
    """The name that imports a class's module, also for the file that Python was started with."""
    main = sys.modules.get("__main__")
    if cls.__module__ != "__main__" or getattr(main, "__file__", None) is None:
        return cls.__module__
    return main.__spec__.name if main.__spec__ else Path(main.__file__).stem


def find_class(name: Any, allow_import: Sequence[str] = (), key: str = "value") -> type:
    """The dataclass module:Name. Imports nothing unless the module is this package's, or allowed.

    Raises ValueError with one line that begins with `key`.
    """
    module, _, cls = name.partition(":") if isinstance(name, str) else ("", "", "")
    wrong = f"{key}: {name!r} is not a dataclass of {PACKAGE}"
    if not any(module == prefix or module.startswith(f"{prefix}.") for prefix in (PACKAGE, *allow_import)):
        top = module.split(".")[0]
        hint = f"; if you trust it: --allow_import={top} (Python: allow_import=({top!r},))"
        raise ValueError(wrong + (hint if top.isidentifier() else ""))
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{wrong}: {error}; is its folder on PYTHONPATH?") from error
    names = [other for other, value in vars(found).items() if dataclasses.is_dataclass(value)]
    near = difflib.get_close_matches(cls, names, n=1)
    for part in cls.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and _module_name(found) == module):
        hint = f": did you mean {near[0]}?" if near else ", as module:Name"
        raise ValueError(f"{key}: {name!r} is not a dataclass of {', '.join((PACKAGE, *allow_import))}{hint}")
    return found


def _fit(value: Any, hint: Any, key: str) -> Any:
    """The value, its types checked all the way down. Whole numbers become floats where floats are declared."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _fit(value, next((arg for arg in args if _accepts(arg, value)), args[0]), key)
    if dataclasses.is_dataclass(value) and _accepts(hint, value):
        _check_protocol(value, hint, key)
        hints = typing.get_type_hints(type(value))
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(
            value, **{name: _fit(getattr(value, name), hints[name], f"{key}.{name}") for name in names}
        )
    if origin is tuple and isinstance(value, tuple):
        return tuple(_fit(part, args[0], key) for part in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or (origin is Literal and value in args) or _accepts(hint, value):
        return value
    raise ValueError(f"{key.removeprefix('config.')} takes {_name(hint)}; got {value!r}")


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a value may stand in a field of this type, on its face. A protocol accepts any dataclass."""
    if dataclasses.is_dataclass(value):
        return hint is Any or _is_protocol(hint) or (isinstance(hint, type) and isinstance(value, hint))
    return isinstance(hint, type) and type(value) is hint


def _is_protocol(hint: Any) -> bool:
    return getattr(hint, "_is_protocol", False)


def _check_protocol(value: Any, hint: Any, key: str) -> None:
    """Raises ValueError naming what a user's class lacks."""
    if not _is_protocol(hint) or type(value).__module__.split(".")[0] == PACKAGE:
        return
    wanted = {name for name in (*vars(hint), *getattr(hint, "__annotations__", ())) if not name.startswith("_")}
    if missing := sorted(name for name in wanted if not hasattr(value, name)):
        kind = f"{key.removeprefix('config.')} of class {type(value).__name__}"
        raise ValueError(f"{kind} is no {hint.__name__}: it lacks {', '.join(missing)}")
