"""What the processes of one run exchange: whether they have the same inputs, and whether one of them failed."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils


class LostHostError(RuntimeError):
    """This process can't continue because another one is gone; the message is one line for the user."""


def is_first() -> bool:
    """Whether this process writes and prints for all of them."""
    return jax.process_index() == 0


def anywhere(truth: bool) -> bool:
    """Whether it is true of any process. All processes must call it."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(truth))))


def check_same(what: str, value: object) -> None:
    """Raises ValueError on every process unless all have a value of the same repr. All processes must call it."""
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint32)
    others = np.flatnonzero(np.any(multihost_utils.process_allgather(digest) != digest, axis=-1))
    if anywhere(len(others) > 0):
        raise ValueError(
            f"the processes of this run have different {what}: give all of them the same flags, files and workdir"
        )
