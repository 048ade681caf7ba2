"""A launcher's flags: each launcher has a set of its own, so that one process can import several launchers.

    FLAGS = Flags(profiler.FLAGS)
    SEED = FLAGS.integer("seed", 0, "Seed of all draws, 0 to 2**32 - 1.")

Values are read as `SEED.value` once `FLAGS.parse` has run. `command.FLAGS` are the flags that every launcher includes.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from diffusion_lm.config import Config, load, override
from diffusion_lm.convert.loading import read_config


class FlagRow(NamedTuple):
    """One flag as --help and docs/cli.md show it."""

    name: str
    default: str
    help: str


class Flags:
    """The flags of one launcher, or flags that several launchers share.

    The methods string, integer, float, bool, enum, list and multi_string define a flag as absl's DEFINE functions do.
    """

    def __init__(self, *included: "Flags"):
        self.values = flags.FlagValues()
        self._included, self._required = included, set()
        for other in included:
            self.values.append_flag_values(other.values)
            self._required |= other._required
        self.string = self._definer(flags.DEFINE_string)
        self.integer = self._definer(flags.DEFINE_integer)
        self.float = self._definer(flags.DEFINE_float)
        self.bool = self._definer(flags.DEFINE_bool)
        self.enum = self._definer(flags.DEFINE_enum)
        self.list = self._definer(flags.DEFINE_list)
        self.multi_string = self._definer(flags.DEFINE_multi_string)

    def _definer(self, define: Callable) -> Callable:
        @functools.wraps(define)
        def defined(name: str, *arguments, required: bool = False, **options) -> flags.FlagHolder:
            self._required |= {name} if required else set()
            return define(name, *arguments, flag_values=self.values, **options)

        return defined

    def config(self) -> Callable[[], Config]:
        """Defines --config and --set; the result, called after parsing, returns the Config that they describe.

        It uses --allow_import, one of the flags that every launcher includes.
        """
        text = (
            "Python file with get_config(), FILE.py:KIND, which passes KIND to it, or a .json file: one of this "
            "library's, or a public model's config.json."
        )
        path = self.string("config", None, text, required=True)
        settings = self.multi_string("set", [], "KEY=VALUE, as in optim.lr=1e-3; may be repeated.")
        return lambda: override(self._read(Path(path.value)), settings.value)

    def _read(self, path: Path) -> Config:
        if path.suffix == ".json" and path.is_file() and b'"model_type"' in path.read_bytes():
            return read_config(path)
        return load(str(path), self.values.allow_import)

    def workdir(self, default: str | None = None) -> flags.FlagHolder[str]:
        """Defines --workdir, which is required unless it has a default."""
        text = "Folder of the run: its checkpoints and metrics."
        return self.string("workdir", default, text, required=default is None)

    def out(
        self, text: str = "File that the JSON result is written to as well. Default: none."
    ) -> Callable[[], Path | None]:
        """Defines --out, a file for the result; the result, called after parsing, checks that its folder exists."""
        out = self.string("out", None, text)

        def path() -> Path | None:
            if out.value and not Path(out.value).absolute().parent.is_dir():
                raise FileNotFoundError(f"--out={out.value}: its folder doesn't exist")
            return Path(out.value) if out.value else None

        return path

    def parse(self, arguments: Sequence[str]) -> None:
        """Sets every flag, to its default where `arguments` don't name it.

        Raises ValueError for an argument that is no flag, isn't UTF-8, or has a value out of range.
        """
        for argument in arguments:
            try:
                argument.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the argument {argument!a} isn't valid UTF-8") from error
        for name in self.values:
            self.values[name].unparse()
        try:
            rest = self.values(["", *arguments])[1:]
        except flags.UnrecognizedFlagError as error:
            raise ValueError(f"there is no flag --{error.flagname}; {self._nearest(error.flagname)}") from error
        except flags.Error as error:
            raise ValueError(str(error)) from error
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; every option starts with --")
        self._mark_as_parsed()
        for name in self.values:
            value = self.values[name].value
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name}={value} isn't a finite number")
        for name in sorted(self._required):
            if self.values[name].value is None:
                raise ValueError(f"--{name} is missing. {self.values[name].help}")

    def _nearest(self, name: str) -> str:
        """The flag of most similar spelling; a word of a longer flag counts less than a whole one."""

        def similarity(known: str) -> float:
            words = [difflib.SequenceMatcher(None, name, word).ratio() for word in known.split("_")]
            return max(difflib.SequenceMatcher(None, name, known).ratio(), 0.9 * max(words))

        near = max(self.values, key=similarity)
        return f"did you mean --{near}?" if similarity(near) >= 0.6 else "--help lists all flags"

    def _mark_as_parsed(self) -> None:
        self.values.mark_as_parsed()
        for other in self._included:
            other._mark_as_parsed()

    def rows(self) -> Iterator[FlagRow]:
        """The flags in alphabetical order."""
        for name in sorted(self.values):
            flag = self.values[name]
            default = "required" if name in self._required else _shown(flag.default)
            yield FlagRow(name, default, flag.help.split(";\n")[0])  # absl says that it may be repeated


def _shown(default: Any) -> str:
    if default in (None, []):
        return "none"
    if isinstance(default, list):
        return ",".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)
