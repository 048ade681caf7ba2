"""A lock file: one process at a time writes to a folder. It names its owner, and a dead owner's lock is taken over."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from diffusion_lm import files

log = logging.getLogger(__name__)

NAME = ".lock"  # in a folder that is locked
POLL_SECONDS = 0.5


class InUseError(OSError):
    """Another process holds the lock; the message is one line for the user."""


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock while the block runs.

    Args:
        path: the lock file; its folder is made.
        wait: wait for the owner to finish, in place of an error.

    Raises:
        InUseError: if a process that lives, or one on another host, holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    said = False
    while True:
        with _exclusive(path) as file:
            owner = _read(file)
            if not _alive(owner):
                file.truncate(0)
                json.dump(_identity(os.getpid()), file)
                break
        if not wait:
            raise InUseError(_message(path, owner))
        if not said:
            log.warning("waiting: %s", _message(path, owner))
        said = True
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def check(path: Path) -> None:
    """Raises InUseError if `hold` would; writes nothing."""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        owner = _read(file)
        if _alive(owner):
            raise InUseError(_message(path, owner))


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[TextIO]:
    """The file, opened by one process at a time, so that only one of several takes over a dead owner's lock."""
    while True:
        with files.named(path), path.open("a+", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if same:  # and not one that its owner deleted meanwhile
                yield file
                return


def _read(file: TextIO) -> dict:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _identity(pid: int) -> dict:
    """Host and process. `started` tells apart two processes that got the same id one after the other."""
    started = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    return {"host": socket.gethostname(), "pid": pid, "started": started}


def _alive(owner: dict) -> bool:
    """Whether the owner may still be there: one on another host counts as alive."""
    if not isinstance(owner.get("pid"), int) or not owner.get("host"):
        return False
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return owner.get("started") in (None, _identity(owner["pid"])["started"])


def _message(path: Path, owner: dict) -> str:
    return (
        f"{path.parent} is in use by process {owner['pid']} on {owner['host']}: wait for it or stop it, or use another "
        f"folder; if it is gone, delete {path}"
    )
