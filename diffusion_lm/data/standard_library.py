"""This Python's standard library as text: a corpus that is there without a network."""

import ast
import functools
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffusion_lm.data.text_parts import decode

# Tests, other people's packages, vendored tools, and tables that are hardly prose or code.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


def files() -> tuple[Path, tuple[Path, ...]]:
    """The root of the library, and its modules in order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - SKIPPED  # other people's packages may be many
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise FileNotFoundError(f"this Python has no standard-library source in {root}: give a file or folder of text")
    return root, tuple(sorted(found))


def docstrings(file: Path, root: Path) -> Iterator[Iterable[str]]:
    """One document: those of a module, under their dotted names."""
    parts = file.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    yield ("\n\n".join(_module_docstrings(file, name)),)


@functools.cache  # parsing takes seconds, and a run reads its corpus several times
def _module_docstrings(file: Path, name: str) -> tuple[str, ...]:
    return tuple(_described(ast.parse(decode(file, file.read_bytes())), name))


def _described(node: ast.AST, name: str) -> Iterator[str]:
    """The name and cleaned docstring of a module, class or function, then those of the definitions in it."""
    if docstring := ast.get_docstring(node):
        yield f"{name}\n{docstring}\n"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}")
