"""What every launcher does around its main function: flags, logs, errors in one line, the result as one JSON line."""

import atexit
import ctypes
import importlib.util
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags as absl_flags
from absl import logging as absl_logging

from diffusion_lm.training.checkpoint import CheckpointError
from diffusion_lm.training.hosts import LostHostError
from diffusion_lm.training.loop import NonFiniteError
from launch import distributed
from launch.flags import Flags

FLAGS = Flags(distributed.FLAGS)
COMPILE_CACHE = FLAGS.string(
    "compile_cache", None, "Folder for compiled programs that took over a second to compile. Default: none are kept."
)
ALLOW_IMPORT = FLAGS.multi_string(
    "allow_import", [], "Module or package whose classes a checkpoint or a .json config may name; may be repeated."
)
VERBOSITY = FLAGS.integer("verbosity", 0, "0 logs progress; 1 logs more, and where an error came from.", 0, 1)
FLAGS.bool("help", False, "Lists all flags.")
# Numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_INTERRUPTED = 130  # what a shell reports after ^C


def run(main: Callable[[], dict], flags: Flags) -> None:
    """Runs a launcher as this process and exits: 0, 2 after bad input, 1 after a run that failed.

    The result is the last line of the first process's standard output.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see launch/__init__.py
    if sys.stderr is None:  # closed: print would write errors to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        print("error: standard output is closed, so the result would be lost", file=sys.stderr)
        sys.exit(2)
    _keep_memory()
    status = call(main, flags, sys.argv[1:], set_up=_set_up_logs)
    _drop_output()
    distributed.leave(status)
    if status == _INTERRUPTED:  # JAX's compiler, once interrupted, crashes at the interpreter's end
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def call(
    main: Callable[[], dict], flags: Flags, arguments: Sequence[str], set_up: Callable[[], None] = lambda: None
) -> int:
    """Parses `arguments`, calls `main` and prints its result as one JSON line; returns the exit status.

    An error is one line on standard error; with --verbosity=1 the traceback is logged as well.
    """
    try:
        if "--help" in arguments:
            _print(usage(sys.modules[main.__module__].__doc__, flags))
            return 0
        flags.parse(arguments)
        set_up()
        if COMPILE_CACHE.value is not None:
            _keep_programs(Path(COMPILE_CACHE.value).absolute())
        distributed.join()
        result = main()
        if distributed.is_first():
            _print(json.dumps(result))
        return 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return _INTERRUPTED
    except (CheckpointError, LostHostError, NonFiniteError, ValueError, OSError) as error:
        logging.getLogger("diffusion_lm").debug("where it happened", exc_info=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, RuntimeError) else 2
    except Exception:
        traceback.print_exc()
        return 1


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        raise OSError(f"the result can't be written to standard output: {error.strerror}") from error


def usage(doc: str, flags: Flags) -> str:
    """The launcher's docstring and all its flags."""
    lines = (f"  --{row.name}  {row.help} [{row.default}]" for row in flags.rows())
    return "\n".join([doc.strip(), "", "flags [default]:", *lines])


def needs(package: str, extra: str, what: str) -> None:
    """Raises ValueError if `package` isn't installed, so that it is said before the work that needs it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs {package}: pip install 'diffusion_lm[{extra}]'")


def _keep_memory() -> None:
    """Tells glibc to keep freed memory: one arena, no mmap for large blocks, no trimming.

    On a CPU, XLA allocates a step's temporaries anew at every call. Pages that went back to the kernel must be cleared
    again, which costs a third of a small model's training step. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def _keep_programs(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)  # JAX would only warn, and compile
    except FileExistsError as error:
        raise NotADirectoryError(f"--compile_cache={folder} is a file, not a folder") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _set_up_logs() -> None:
    """This package at INFO; Orbax, which logs each thread's traceback on a full disk, only with --verbosity=1."""
    absl_flags.FLAGS(sys.argv[:1])  # absl's own flags keep their defaults
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(VERBOSITY.value)
    logging.getLogger("diffusion_lm").setLevel(logging.DEBUG if VERBOSITY.value else logging.INFO)
    if not VERBOSITY.value:
        logging.getLogger("jax").setLevel(logging.WARNING)
        absl = logging.getLogger("absl")
        absl.setLevel(logging.INFO)
        absl.addFilter(lambda record: "orbax" not in record.pathname)
        logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
        sys.unraisablehook = _quiet


def _quiet(unraisable) -> None:
    """Hides tensorstore's complaint about a loop that Orbax closed after an error; the error itself is reported."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _drop_output() -> None:
    """After a failed write, output that is still buffered would fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
