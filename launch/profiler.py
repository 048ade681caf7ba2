"""What a device does, second by second: a profiler's trace, for TensorBoard's profile plugin or xprof."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import flags

log = logging.getLogger("diffusion_lm.profiler")

PROFILE = flags.DEFINE_string("profile", None, "Folder for a profiler's trace of a little of the work, once compiled.")
SKIPPED, TRACED = 2, 3  # calls: the first compiles


@contextlib.contextmanager
def some_calls(function: Callable) -> Iterator[Callable]:
    """`function`, of which calls 3 to 5 leave a trace where --profile says; those that there were, if it ends sooner.

    Raises OSError where nothing can be written.
    """
    if PROFILE.value is None:
        yield function
        return
    folder, calls, tracing = _folder(), itertools.count(1), contextlib.ExitStack()

    def call(*arguments):
        number = next(calls)
        if number == SKIPPED + 1:
            tracing.enter_context(jax.profiler.trace(folder))
        found = function(*arguments)
        if number == SKIPPED + TRACED:
            jax.block_until_ready(found)
            tracing.close()
            log.info("calls %d to %d are traced in %s", SKIPPED + 1, number, folder)
        return found

    with tracing:
        yield call
    if next(calls) <= SKIPPED + 1:
        log.warning("--profile=%s: no trace, which begins at call %d of the device", folder, SKIPPED + 1)


def once_more(function: Callable[[], object]) -> None:
    """Calls it, traced, where --profile asks for it: what it had to compile, it has compiled before.

    Raises OSError where nothing can be written.
    """
    if PROFILE.value is not None:
        with jax.profiler.trace(_folder()):
            function()


def _folder() -> str:
    folder = Path(PROFILE.value).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"--profile={folder} is no folder") from error
    return str(folder)
