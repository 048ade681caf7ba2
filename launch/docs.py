"""Writes the pages of docs/ that come from the code: config.md, cli.md and attention.svg.

    python -m launch.docs --out=docs

It also writes the repository's name, REPOSITORY in this file, into the notebooks and into README.md's links to Colab.
A test compares the committed files with what this writes. The last line on standard output is a JSON object with the
files' names.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffusion_lm.attention_patterns import (
    AttentionPattern,
    BlockCausal,
    BlockDiffusionTraining,
    Causal,
    DraftAndVerify,
    Full,
)
from diffusion_lm.config import Config
from launch import command
from launch.flags import Flags

REPOSITORY = "OWNER/diffusion_lm"  # its name on GitHub, for Colab and pip: set OWNER once it is public
ROOT = Path(__file__).parents[1]

FLAGS = Flags(command.FLAGS)
OUT = FLAGS.string("out", "docs", "Folder that the pages are written to.")
NOTE = "<!-- Written by `python -m launch.docs`; edit the docstrings instead. -->"
PLACES = {  # where the library's own implementations of a protocol, or of a config key of any type, are
    "DataSource": ("diffusion_lm.data.source", "diffusion_lm.data.prompt_response", "diffusion_lm.planning.data"),
    "ModelSpec": ("diffusion_lm.models",),
    "process": ("diffusion_lm.processes",),
    "Schedule": ("diffusion_lm.schedules",),
    "objective": ("diffusion_lm.objectives", "diffusion_lm.planning.objectives"),
    "Optimizer": ("diffusion_lm.training.optimizer",),
}
PATTERNS = {  # what attention.svg shows, for rows of 8 positions
    "Causal()": Causal(),
    "Full()": Full(),
    "BlockCausal(4)": BlockCausal(4),
    "BlockDiffusionTraining(4, Causal())": BlockDiffusionTraining(4, Causal()),
    "BlockDiffusionTraining(4, BlockCausal(4))": BlockDiffusionTraining(4, BlockCausal(4)),
    "DraftAndVerify(4, 3)": DraftAndVerify(4, 3),
}
CELL, HEAD, GAP, ACROSS = 13, 24, 40, 3  # pixels; panels in a row
LETTER = 7.5  # pixels, the width of a letter of a title


def main() -> dict:
    folder = Path(OUT.value)
    if not folder.is_dir():
        raise NotADirectoryError(f"--out={folder} is no folder")
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, text in named().items():
        (ROOT / name).write_text(text, encoding="utf-8")
    return {"files": sorted(pages())}


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    return {"config.md": config_page(), "cli.md": cli_page(), "attention.svg": attention_picture()}


def named() -> dict[str, str]:
    """README.md and the notebooks, as they are with REPOSITORY in their links and install commands."""
    found = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "colabs").glob("*.ipynb"))):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"(//colab\.research\.google\.com/github/)[^/\s]+/[^/\s]+", rf"\g<1>{REPOSITORY}", text)
        text = re.sub(r"(git\+https://github\.com/)[\w.-]+/[\w.-]+", rf"\g<1>{REPOSITORY}", text)
        found[path.relative_to(ROOT).as_posix()] = text
    return found


# ---- config.md ----


def config_page() -> str:
    """Every dataclass that a Config can hold: its fields with type, default and meaning."""
    parts = [
        f"{NOTE}\n\n# Configuration\n",
        "A config is a Python file with `get_config() -> Config`. `--set=KEY=VALUE` changes one field. An unknown key, "
        "a wrong type or a value out of range is refused in one line. Lengths are in tokens and intervals in "
        "updates, unless a meaning says otherwise. A config may also name [classes of your own](extending.md).\n",
        _class_section(Config, "Config", level=2),
    ]
    for key, hint in typing.get_type_hints(Config).items():
        if classes := _options(key, hint):
            parts += [f"## `{key}`\n", *(_class_section(cls, key) for cls in classes)]
    return "\n".join(parts)


def _options(key: str, hint: Any) -> list[type]:
    """The dataclasses that may stand at a config's key, and those that may stand in them."""
    found: dict[type, None] = {}

    def visit(key: str, hint: Any) -> None:
        for cls in _alternatives(key, hint):
            if cls not in found:
                found[cls] = None
                for name, inner in typing.get_type_hints(cls).items():
                    visit("" if name in PLACES else name, inner)

    visit(key, hint)
    return list(found)


def _alternatives(key: str, hint: Any) -> list[type]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return [cls for arg in typing.get_args(hint) for cls in _alternatives(key, arg)]
    if dataclasses.is_dataclass(hint):
        return [hint]
    if hint is Any or getattr(hint, "_is_protocol", False):
        places = PLACES.get(getattr(hint, "__name__", ""), PLACES.get(key, ()))
        return [cls for place in places for cls in _defined(place) if hint is Any or _satisfies(cls, hint)]
    return []


def _satisfies(cls: type, protocol: type) -> bool:
    names = {name for name in (*vars(protocol), *vars(protocol).get("__annotations__", ())) if not name.startswith("_")}
    return names <= {*dir(cls), *(f.name for f in dataclasses.fields(cls))}


def _defined(place: str) -> Iterator[type]:
    """The public frozen dataclasses of a module or package, in the order of files and lines."""
    root = importlib.import_module(place)
    names = [place, *(f"{place}.{m.name}" for m in pkgutil.iter_modules(getattr(root, "__path__", ())))]
    for module in map(importlib.import_module, names):
        for name, cls in vars(module).items():
            plain = isinstance(cls, type) and dataclasses.is_dataclass(cls) and not hasattr(cls, "_flax_dataclass")
            if plain and cls.__module__ == module.__name__ and not name.startswith("_"):
                yield cls


def _class_section(cls: type, key: str, level: int = 3) -> str:
    summary = " ".join(inspect.cleandoc(cls.__doc__).split("\n\n")[0].split())
    rows = [
        f"| `{f.name}` | {_type(typing.get_type_hints(cls)[f.name])} | {_default(f)} | {meaning(cls, f.name)} |"
        for f in dataclasses.fields(cls)
        if f.init
    ]
    table = ["| field | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else ["No fields.", ""]
    return "\n".join([f"{'#' * level} {cls.__name__}\n", f"`{cls.__module__}`. {summary}\n", *table])


def meaning(cls: type, name: str) -> str:
    """What a class's docstring, or that of a class it derives from, says about a field.

    An entry is `name: text` or, in a table, `name   text`; deeper or unnamed lines continue it.
    """
    for owner in cls.__mro__:
        lines = inspect.cleandoc(owner.__doc__ or "").splitlines()
        for i, line in enumerate(lines):
            start = re.match(rf"(\s*)(?:\w+, )*{name}(?:, \w+)*(?::\s+|\s\s+)(\S.*)", line)
            if not start:
                continue
            parts, indent = [start[2]], len(start[1])
            for more in lines[i + 1 :]:
                if not more.strip() or len(more) - len(more.lstrip()) <= indent:
                    break
                parts.append(more.strip())
            return _cell(" ".join(parts))
    return ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(arg) for arg in args)
    if origin is tuple:
        return f"tuple of {_type(args[0])}"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint).removeprefix("typing."))


def _default(f: dataclasses.Field) -> str:
    if f.default_factory is not dataclasses.MISSING:
        return _value(f.default_factory())
    return "required" if f.default is dataclasses.MISSING else _value(f.default)


def _value(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        changed = [
            f"{f.name}={_value(getattr(value, f.name))}"
            for f in dataclasses.fields(value)
            if f.init and _default(f) != _value(getattr(value, f.name))
        ]
        return f"{type(value).__name__}({', '.join(changed)})"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else "empty" if value in ("", ()) else str(value)


# ---- cli.md ----


def launchers() -> list[str]:
    """The modules of launch/ that are run with `python -m`, shortest name first."""
    root = Path(__file__).parent
    found = [
        ".".join(("launch", *path.relative_to(root).with_suffix("").parts))
        for path in sorted(root.rglob("*.py"))
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in _body(path))
    ]
    return sorted(found, key=lambda name: (name.count("."), name))


def _body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def cli_page() -> str:
    """Every launcher: its docstring and its flags."""
    parts = [
        f"{NOTE}\n\n# Command line\n",
        "Every launcher runs from the checkout as `python -m launch.NAME` and ends with one JSON line on standard "
        "output. Exit status: 0, 2 for bad input (one line names cause and remedy), 1 for a run that failed.\n",
        *(f"- [{name}](#{name.replace('.', '')})" for name in launchers()),
        "\n## Flags of every launcher\n",
        _flag_table(command.FLAGS),
    ]
    shared = set(command.FLAGS.values)
    for name in launchers():
        module = importlib.import_module(name)
        summary, _, rest = module.__doc__.strip().partition("\n\n")
        details = f"```text\n{rest}\n```\n" if rest else ""
        parts += [f"## {name}\n", summary + "\n", details, _flag_table(module.FLAGS, shared)]
    return "\n".join(part for part in parts if part)


def _flag_table(flags: Flags, hidden: set[str] = frozenset()) -> str:
    rows = []
    for row in flags.rows():
        if row.name not in hidden:
            flag = flags.values[row.name]
            choices = getattr(flag.parser, "enum_values", None)
            kind = " or ".join(f"`{choice}`" for choice in choices) if choices else flag.flag_type()
            text = re.sub(r"^<[^>]*>: ", "", row.help) if choices else row.help  # absl lists the choices there, too
            rows.append(f"| `--{row.name}` | {kind} | {row.default} | {_cell(text)} |")
    return (
        "\n".join(["| flag | type | default | meaning |", "|---|---|---|---|", *rows, ""])
        if rows
        else "No flags of its own.\n"
    )


# ---- attention.svg ----


def attended(pattern: AttentionPattern, length: int) -> np.ndarray:
    """bool [row, row]: whether a query (first axis) attends to a key."""
    mask = np.zeros((pattern.row_length(length),) * 2, bool)
    query = 0
    for group in pattern.key_ranges(length):
        width = group[0].first.shape[1]
        for source in group:
            start = source.keys[0] if source.keys else 0
            for i in range(width):
                first, last = int(source.first[0, i]), int(source.last[0, i])
                mask[query + i, start + first : start + last + 1] = True
        query += width
    return mask


def attention_picture(length: int = 8) -> str:
    """SVG with a square for each pair of positions of each pattern: filled where the query attends to the key."""
    masks = {name: attended(pattern, length) for name, pattern in PATTERNS.items()}
    names = list(masks)
    rows = [names[i : i + ACROSS] for i in range(0, len(names), ACROSS)]
    panel = max(max(len(mask) for mask in masks.values()) * CELL, int(LETTER * max(map(len, masks))))
    heights = [HEAD + max(len(masks[name]) for name in row) * CELL + GAP for row in rows]
    width, height = ACROSS * (panel + GAP) + GAP, sum(heights) + GAP // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img"><title>Attention patterns: queries down, keys across</title><style>text{font:12px ui-monospace,'
        "monospace;fill:#23262b}.on{fill:#0b7a5c}.off{fill:#ece9e1}@media(prefers-color-scheme:dark){text{fill:#e4e3de}"
        ".on{fill:#4fd3aa}.off{fill:#30353e}}</style>"
    ]
    for row, top in zip(rows, np.cumsum([GAP // 2, *heights]), strict=False):
        for column, name in enumerate(row):
            left = GAP + column * (panel + GAP)
            parts.append(f'<text x="{left}" y="{top + 12}">{name}</text>')
            parts += _squares(masks[name], left, int(top) + HEAD)
    return "\n".join([*parts, "</svg>\n"])


def _squares(mask: np.ndarray, left: int, top: int) -> Iterator[str]:
    for state, name in ((True, "on"), (False, "off")):
        at = np.argwhere(mask == state)
        path = "".join(f"M{left + k * CELL} {top + q * CELL}h{CELL - 1}v{CELL - 1}h-{CELL - 1}z" for q, k in at)
        yield f'<path class="{name}" d="{path}"/>'


if __name__ == "__main__":
    command.run(main, FLAGS)
