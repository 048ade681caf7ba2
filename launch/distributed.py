"""Several processes, one run: how each finds the others, and how they end together."""

import logging
import os
import sys

import jax
from absl import flags

DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes. On TPU pods and Slurm that is all.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing else tells.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes; goes with --coordinator.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; goes with --coordinator.")
TIMEOUT = flags.DEFINE_integer("host_timeout", 30, "Seconds of silence after which a process counts as lost.", 5, 600)


def join() -> None:
    """Makes this one of several processes, if flags say so; only the first goes on logging what all of them know.

    Raises ValueError where flags are missing or nobody is found.
    """
    where = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if not any(value is not None for value in where):
        if not DISTRIBUTED.value:
            return
    elif None in where or not 0 <= PROCESS.value < PROCESSES.value:
        raise ValueError(
            f"--coordinator={where[0]} --num_processes={where[1]} --process_id={where[2]}: give all three, "
            "with process_id from 0 to num_processes - 1"
        )
    try:
        jax.distributed.initialize(*where, heartbeat_timeout_seconds=TIMEOUT.value)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"can't join the other processes ({' '.join(str(error).split())[:200]}): on TPU pods and Slurm give "
            "--distributed alone, elsewhere --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    if jax.process_index():
        logging.getLogger("diffusion_lm").setLevel(logging.WARNING)


def is_first() -> bool:
    """Whether this process prints what all of them know."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def leave(status: int) -> None:
    """Ends this process at once where there are others and it failed: a polite end would wait for them, and they for
    it. They notice within --host_timeout seconds."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
