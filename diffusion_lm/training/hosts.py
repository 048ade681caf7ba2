"""What the processes of one run say to each other: whether they see the same, and whether one of them failed."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils


class LostHostError(RuntimeError):
    """This process can't go on because another one is gone; the message is one line for the user."""


def is_first() -> bool:
    """Whether this process is the one that writes and prints what all of them know."""
    return jax.process_index() == 0


def anywhere(truth: bool) -> bool:
    """Whether it is true of any process. All have to ask."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(truth))))


def check_same(what: str, value: object) -> None:
    """Raises ValueError on every process unless all have a value of the same repr. All have to ask."""
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint32)
    others = np.flatnonzero(np.any(multihost_utils.process_allgather(digest) != digest, axis=-1))
    if anywhere(len(others) > 0):
        raise ValueError(f"not every process sees the same {what}: give all of them the same flags, files and workdir")
