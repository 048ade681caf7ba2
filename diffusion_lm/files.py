"""Errors of writing that name the file."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """An OSError of the block names the file and a remedy: that of a full disk names neither."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        message = f"cannot write ({error.strerror}): free space there, or name another folder"
        raise OSError(error.errno, message, str(path)) from error
