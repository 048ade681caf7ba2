"""Numbers that public code computed: one folder a family, beside the checkout or where DIFFUSION_LM_PARITY points.

Nothing here knows a size: networks are built from config.json, and runs are found by the names of the arrays in io.npz.
"""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(os.environ.get("DIFFUSION_LM_PARITY") or Path(__file__).parents[2] / "../shared/parity")


def folder(family: str) -> Path:
    """The family's folder; skips the calling test where it is absent."""
    if not (ROOT / family / "io.npz").is_file():
        pytest.skip(_absent(family))
    return ROOT / family


@functools.cache
def arrays(family: str) -> dict[str, np.ndarray]:
    with np.load(folder(family) / "io.npz") as stored:
        return dict(stored)


@functools.cache
def config(family: str) -> dict:
    return json.loads((folder(family) / "config.json").read_text())


@functools.cache
def weights(family: str) -> dict[str, np.ndarray]:
    return pytest.importorskip("safetensors.numpy").load_file(folder(family) / "model.safetensors")


def found(family: str, pattern: str) -> list:
    """One test parameter for each distinct start of an array's name that matches `pattern` and ends before a slash.

    Args:
        family: name of the folder.
        pattern: regular expression with named groups for what the name says (block size, steps, ...).

    Returns:
        Values for `pytest.mark.parametrize`: `re.Match` objects, or one skipped parameter where the folder is absent.

    Raises:
        ValueError: the folder is there, but no array has such a name.
    """
    if not (ROOT / family / "io.npz").is_file():
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=_absent(family)))]
    with np.load(ROOT / family / "io.npz") as stored:
        matches = (re.match(rf"(?:{pattern})(?=/)", name) for name in stored.files)
        distinct = {match[0]: match for match in matches if match}
    if not distinct:
        raise ValueError(f"{ROOT / family}/io.npz has no array whose name begins with {pattern!r}")
    return [pytest.param(match, id=name.removeprefix("sampler/")) for name, match in distinct.items()]


def _absent(family: str) -> str:
    return f"no stored numbers of {family}: {ROOT / family}/io.npz is absent (DIFFUSION_LM_PARITY names another root)"
