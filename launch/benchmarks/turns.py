"""Times cases of several libraries in turns, each library in a process of its own: their pools of threads disturb one
another."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any

from launch.benchmarks import timing
from launch.benchmarks.timing import Row, Timing

INSTALL = "pip install -e '.[bench]'"
_ANSWER = "answer: "  # begins a line that is ours; libraries print what they like between


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A library's cases, which run in a process of their own.

    Args:
        cases: "module:function", which returns the cases by name, or the only one.
        options: the function's arguments, as JSON holds them.
        packages: what it needs.
    """

    cases: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    packages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """What was measured.

    timings  by (peer, name of its case, "" for the only one), and by the name of a case of this process
    absent   why a peer has no timings
    """

    timings: Mapping[Hashable, Timing]
    absent: Mapping[str, str]

    def fastest(self, peers: Collection[str], case: str = "") -> str:
        """The peer whose median is the shortest; the first where none was measured."""
        peers = list(peers)
        return min(
            (p for p in peers if p not in self.absent), key=lambda p: self.timings[p, case].wall, default=peers[0]
        )

    def compared(self, row: Row, ours: Hashable, peer: str, amount: float, case: str = "") -> Row:
        """The row of our case with a peer's as its reference, or with the reason why it has none."""
        if peer in self.absent:
            return dataclasses.replace(row, skipped=f"{peer}: {self.absent[peer]}")
        return timing.compared(row, self.timings[ours], self.timings[peer, case], amount)


class PeerFailed(Exception):
    """A peer's process has ended, or its case has failed."""

    def __init__(self, peer: str, why: str):
        super().__init__(why)
        self.peer = peer


def missing(*packages: str) -> str:
    """Why cases that need `packages` can't run; empty if they can."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed: {INSTALL} (a CPU build of torch is enough)" if absent else ""


def take_turns(peers: Mapping[str, Peer], repeats: int, ours: Mapping[Hashable, Callable] | None = None) -> Turns:
    """Times the peers' cases and those of this process, as `timing.alternate` does.

    A peer that can't start or that fails is left out, and the others are timed anew: it would have slowed its rounds.
    """
    absent = {name: why for name, peer in peers.items() if (why := missing(*peer.packages))}
    with contextlib.ExitStack() as stack:
        cases = dict(ours or {})
        for name, peer in peers.items():
            if name in absent:
                continue
            try:
                cases |= stack.enter_context(_started(name, peer))
            except PeerFailed as error:
                absent[name] = str(error)
        while True:
            try:
                return Turns(timings=timing.alternate(cases, repeats), absent=absent)
            except PeerFailed as error:
                absent[error.peer] = str(error)
                cases = {name: case for name, case in cases.items() if getattr(case, "peer", None) != error.peer}


@dataclasses.dataclass(frozen=True)
class _Elsewhere:
    """A case of a peer's process."""

    peer: str
    name: str
    process: subprocess.Popen

    def clocked(self) -> tuple[float, float]:
        """What `timing.clocked` measures there."""
        with contextlib.suppress(BrokenPipeError):  # of an ended process, which is said below
            print(self.name, file=self.process.stdin, flush=True)
        return tuple(_answer(self.peer, self.process))

    __call__ = clocked


@contextlib.contextmanager
def _started(name: str, peer: Peer) -> Iterator[dict[tuple[str, str], _Elsewhere]]:
    command = [sys.executable, "-c", f"from {__name__} import answer; answer({peer.cases!r}, {dict(peer.options)!r})"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # it imports what this process can
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield {(name, case): _Elsewhere(name, case, process) for case in _answer(name, process)}
        finally:
            process.kill()


def _answer(peer: str, process: subprocess.Popen) -> Any:
    for line in process.stdout:
        if line.startswith(_ANSWER):
            found = json.loads(line.removeprefix(_ANSWER))
            if "failed" in found:
                raise PeerFailed(peer, found["failed"])
            return found["found"]
    raise PeerFailed(peer, f"the process of {peer} ended with status {process.wait()}")


def answer(cases: str, options: dict[str, Any]) -> None:
    """What a peer's process does: makes its cases and says their names, then runs one for each line it is sent."""
    try:
        module, function = cases.split(":")
        made = getattr(importlib.import_module(module), function)(**options)
        made = made if isinstance(made, Mapping) else {"": made}
        _say(found=list(made))
        for line in sys.stdin:
            _say(found=timing.clocked(made[line.removesuffix("\n")]))
    except Exception as error:
        traceback.print_exc()
        _say(failed=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200])


def _say(**found: Any) -> None:
    print("", f"{_ANSWER}{json.dumps(found)}", sep="\n", flush=True)
