"""One run of several processes: how they find each other, and how they end together."""

import logging
import os
import sys

import jax

from launch.flags import Flags

FLAGS = Flags()
DISTRIBUTED = FLAGS.bool("distributed", False, "Joins the other processes of a TPU pod or Slurm job.")
COORDINATOR = FLAGS.string("coordinator", None, "HOST:PORT of process 0, where the other processes can't be found.")
PROCESSES = FLAGS.integer("num_processes", None, "Number of processes; goes with --coordinator.")
PROCESS = FLAGS.integer("process_id", None, "Index of this process, 0 to num_processes - 1; goes with --coordinator.")
TIMEOUT = FLAGS.integer("host_timeout", 30, "Seconds without a heartbeat after which a process counts as lost.", 5, 600)


def join() -> None:
    """Joins the other processes if the flags say so; after that only the first process logs what all of them know.

    Raises ValueError if a flag is missing or the other processes can't be reached.
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
    """Whether this is the process that prints the result."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def leave(status: int) -> None:
    """Ends a failed process at once if there are others: a clean exit would wait for them, and they for it.

    The others notice within --host_timeout seconds.
    """
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
