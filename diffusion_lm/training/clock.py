"""How a run's time is spent, and which share of the devices' peak it uses."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

# Dense bfloat16 operations per second of a chip, by its vendor's data sheet; keys are jax's device kinds.
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
BANDWIDTH = {  # of its memory, bytes per second, by the same data sheets
    "TPU v4": 1.2e12,
    "TPU v5 lite": 0.82e12,
    "TPU v5": 2.77e12,
    "TPU v6 lite": 1.64e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
}
KINDS = ("start", "compile", "data", "evaluate", "save")


class Clock:
    """Seconds since it was made, by kind; the rest counts as steps."""

    def __init__(self):
        self._started = time.monotonic()
        self._spent = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Counts the time inside the block as `kind`. "data" is waiting for a batch; devices may be busy meanwhile."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._spent[kind] += time.monotonic() - started

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind, and of "steps"."""
        return {**self._spent, "steps": self.total - sum(self._spent.values())}

    @property
    def total(self) -> float:
        return time.monotonic() - self._started

    @property
    def goodput(self) -> float:
        """The share of time that was spent on steps."""
        return self.seconds["steps"] / self.total

    def utilisation(self, operations: Callable[[], float]) -> float | None:
        """Model FLOPs utilisation: useful operations on all devices, over what their peak allows in the time of steps.

        None where the device isn't in PEAK (a CPU); `operations` isn't called then.
        """
        peak = PEAK.get(jax.devices()[0].device_kind)
        if peak is None:
            return None
        return operations() / (self.seconds["steps"] * peak * jax.device_count())
