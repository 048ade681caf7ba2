"""What public code computed, stored beside the checkout: a test file is named after whose numbers it holds us to."""

from pathlib import Path

import numpy as np
import pytest
from support import dit


@pytest.fixture(scope="module")
def folder(shared, request) -> Path:
    peer = request.module.__name__.removeprefix("test_")
    path = shared / "parity" / peer
    if not (path / "io.npz").is_file():
        pytest.skip(f"no stored numbers of {peer}: {path}/io.npz is absent")
    return path


@pytest.fixture(scope="module")
def stored(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "io.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, np.ndarray]:
    return dit.weights(folder / "model.safetensors")
