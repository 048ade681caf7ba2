"""What launchers share: flags to a config, logs to standard error, an error in one line, results as one JSON line."""

import ctypes
import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags

from diffusion_lm.config import Config, load, override
from diffusion_lm.training.checkpoint import CheckpointError
from diffusion_lm.training.hosts import LostHostError
from diffusion_lm.training.loop import NonFiniteError
from launch import distributed

COMPILE_CACHE = flags.DEFINE_string("compile_cache", None, "Folder that keeps what took over a second to compile.")
ALLOW_IMPORT = flags.DEFINE_multi_string(
    "allow_import", [], "Python module or package whose classes a checkpoint or a .json config may name; repeatable."
)
# Numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def define_config() -> Callable[[], Config]:
    """Defines --config and --set; call the result, once flags are parsed, for the config that they make."""
    config = flags.DEFINE_string(
        "config", None, "Python file with get_config(), or FILE.py:ARGUMENT, or a .json file."
    )
    settings = flags.DEFINE_multi_string("set", [], "KEY=VALUE, as in optim.lr=1e-3; may be given again and again.")
    flags.mark_flag_as_required("config")
    return lambda: override(load(config.value, ALLOW_IMPORT.value), settings.value)


def define_workdir() -> flags.FlagHolder[str]:
    """Defines --workdir."""
    return flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics.", required=True)


def run(main: Callable[[], dict]) -> None:
    """Parses flags, runs main and prints what it returns as the last line of the first process's standard output.

    Exit status 2 and one line on standard error for bad input, 1 for a run that failed; --verbosity=1 shows where.
    """

    def guarded(argv: list[str]) -> None:
        try:
            status = _guarded(main, argv)
        except Exception:
            traceback.print_exc()
            status = 1
        distributed.leave(status)
        sys.exit(status)

    app.run(guarded)


def _guarded(main: Callable[[], dict], argv: list[str]) -> int:
    _set_up_logs()
    _keep_memory()
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}; every option starts with --")
        _keep_programs()
        distributed.join()
        result = main()
        if distributed.is_first():
            print(json.dumps(result), flush=True)
        return 0
    except (CheckpointError, LostHostError, NonFiniteError, ValueError, OSError) as error:
        logging.getLogger("diffusion_lm").debug("where it happened", exc_info=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, RuntimeError) else 2


def _keep_memory() -> None:
    """Tells glibc to keep the memory that it was given: one arena, no mmap for large blocks, no trimming.

    On a CPU, XLA asks for a step's temporaries anew at every call; handed back to the kernel in between, each page has
    to be cleared again (a third of a small model's training step). Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def _keep_programs() -> None:
    if COMPILE_CACHE.value is not None:
        folder = Path(COMPILE_CACHE.value).absolute()
        folder.mkdir(parents=True, exist_ok=True)  # JAX would only warn, and compile
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _set_up_logs() -> None:
    """This package at INFO; Orbax, which logs each thread's traceback on a full disk, only when asked for more."""
    more = flags.FLAGS.verbosity > 0
    logging.getLogger("diffusion_lm").setLevel(logging.DEBUG if more else logging.INFO)
    if not more:
        logging.getLogger("jax").setLevel(logging.WARNING)
        absl = logging.getLogger("absl")
        absl.setLevel(logging.INFO)
        absl.addFilter(lambda record: "orbax" not in record.pathname)
        sys.unraisablehook = _quiet


def _quiet(unraisable) -> None:
    """Hides what tensorstore has to say to a loop that Orbax closed after an error; the error itself is reported."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
