"""Where a run's time goes, and what of the devices' speed it uses."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

# Operations a second of a chip, bfloat16, dense, as its maker states them; jax names what it runs on so.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
KINDS = ("start", "compile", "data", "evaluate", "save")


class Clock:
    """Seconds since it was made, by kind; what no kind claims are steps."""

    def __init__(self):
        self._started = time.monotonic()
        self._spent = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Counts what happens inside as `kind`. data: what the next batch is waited for, though devices may be busy."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._spent[kind] += time.monotonic() - started

    @property
    def seconds(self) -> dict[str, float]:
        """By kind, and `steps`."""
        return {**self._spent, "steps": self.total - sum(self._spent.values())}

    @property
    def total(self) -> float:
        return time.monotonic() - self._started

    @property
    def goodput(self) -> float:
        """The share of steps."""
        return self.seconds["steps"] / self.total

    def utilisation(self, operations: Callable[[], float]) -> float | None:
        """The share of the devices' peak that so many useful operations, over all of them, made of the time of steps.

        None where PEAK doesn't know the device (a CPU); then nobody asks for `operations`.
        """
        peak = PEAK.get(jax.devices()[0].device_kind)
        if peak is None:
            return None
        return operations() / (self.seconds["steps"] * peak * jax.device_count())
