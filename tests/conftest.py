"""Every test runs with key reuse and silent rank promotion as errors."""

import atexit
import collections
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from support.begun import causal, converted, lines  # noqa: F401 (fixtures)
from support.trained_run import model, trained  # noqa: F401 (fixtures)

if jax.__version_info__[:2] == (0, 10):  # a flag that XLA doesn't know would end the process
    # The programs of tests are small and run once: compiling each fusion through MLIR takes twice as long, and in 32
    # parts a tenth longer, as the workers have the cores already.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else this is a worker, or the user has one
    # Tests, workers and launchers share what they compile; it goes with the run.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="diffusion_lm-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
gc.set_threshold(100_000, 50, 100)  # tracing makes objects by the million, and hardly a circle
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_disable_most_optimizations", True)  # they take half of the time that the tests take
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

_SHARED = Path(__file__).parents[1] / "../shared"


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="Run every case of tests marked cases(n), not n of them.")


def pytest_collection_modifyitems(config, items):
    """Of a test marked cases(n) runs n cases, spread evenly over the list, the first and the last among them.

    All run with --all-cases, and where the command names a test (FILE::TEST).
    """
    if config.getoption("--all-cases") or any("::" in argument for argument in config.args):
        return
    cases = collections.defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("cases"):
            cases[item.path, item.originalname, mark.args[0]].append(item)
    left = set()
    for (_, _, count), each in cases.items():
        run = {round(i * (len(each) - 1) / max(count - 1, 1)) for i in range(count)}
        left |= {item for i, item in enumerate(each) if i not in run}
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; skips where there is none."""
    if not _SHARED.is_dir():
        pytest.skip("no folder of reference data (../shared) beside the checkout")
    return _SHARED


@pytest.fixture
def optimized():
    """For programs that run longer than they compile, such as those that draw a million samples."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_go_before_they_are_too_many():
    """Each takes some of a process's memory maps; one that reached Linux's 65,530 crashed inside a compilation."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_text().count("\n") > 15_000:
        jax.clear_caches()
