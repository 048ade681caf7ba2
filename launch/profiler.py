"""Traces of what a device does over time, for TensorBoard's profile plugin or xprof."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from launch.flags import Flags

log = logging.getLogger("diffusion_lm.profiler")

FLAGS = Flags()
PROFILE = FLAGS.string("profile", None, "Folder for a profiler trace of a few calls after compilation. Default: none.")
SKIPPED, TRACED = 2, 3  # calls: the first compiles


@contextlib.contextmanager
def some_calls(function: Callable) -> Iterator[Callable]:
    """Yields `function`, whose calls 3 to 5 are traced into the folder --profile, if that is set.

    Raises OSError if the folder can't be written.
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
            log.info("wrote a trace of calls %d to %d to %s", SKIPPED + 1, number, folder)
        return found

    with tracing:
        yield call
    if next(calls) <= SKIPPED + 1:
        log.warning("--profile=%s: no trace was written; tracing starts at call %d", folder, SKIPPED + 1)


def once_more(function: Callable[[], object]) -> None:
    """Calls a function that has already been compiled once more under the tracer, if --profile is set.

    Raises OSError if the folder can't be written.
    """
    if PROFILE.value is not None:
        with jax.profiler.trace(_folder()):
            function()


def _folder() -> str:
    folder = Path(PROFILE.value).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"--profile={folder} is a file, not a folder") from error
    return str(folder)
