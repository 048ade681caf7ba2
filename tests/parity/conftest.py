"""What public code computed, stored beside the checkout: test_NAME.py holds us to the numbers in the folder NAME."""

import numpy as np
import pytest
from support import dit, parity


@pytest.fixture(scope="module")
def family(request) -> str:
    return request.path.stem.removeprefix("test_")


@pytest.fixture(scope="module")
def stored(family) -> dict[str, np.ndarray]:
    return parity.arrays(family)


@pytest.fixture(scope="module")
def config(family) -> dict:
    return parity.config(family)


@pytest.fixture(scope="module")
def network(family) -> dit.DiT:
    return dit.DiT(config=parity.config(family), weights=parity.weights(family))
