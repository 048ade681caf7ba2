"""Every test here runs with key reuse and rank promotion as errors."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    with jax.debug_key_reuse(True), jax.numpy_rank_promotion("raise"):
        yield
