"""Time by kind adds up, and the share of a device's peak follows from it."""

import jax
import pytest

from diffusion_lm.training import clock


@pytest.fixture
def seconds(monkeypatch):
    """A clock's time, to be set."""
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    return now


def test_what_no_kind_claims_are_steps(seconds):
    run = clock.Clock()
    with run.spend("compile"):
        seconds[0] += 30
    seconds[0] += 60
    with pytest.raises(KeyboardInterrupt), run.spend("save"):  # what breaks off counts too
        seconds[0] += 10
        raise KeyboardInterrupt
    assert run.seconds == {"start": 0, "compile": 30, "data": 0, "evaluate": 0, "save": 10, "steps": 60}
    assert run.total == 100 and run.goodput == 0.6


def test_utilisation_is_of_the_time_of_steps_and_of_all_devices(seconds, monkeypatch):
    run = clock.Clock()
    seconds[0] += 50
    with run.spend("evaluate"):
        seconds[0] += 50
    monkeypatch.setitem(clock.PEAK, jax.devices()[0].device_kind, 1e12)
    assert run.utilisation(lambda: 20e12 * jax.device_count()) == 0.4


def test_a_device_nobody_knows_has_no_utilisation(seconds):
    assert clock.Clock().utilisation(lambda: pytest.fail("asked")) is None


def test_each_device_with_a_peak_has_a_bandwidth():
    assert clock.PEAK.keys() == clock.BANDWIDTH.keys()
    assert all(50 < clock.PEAK[kind] / clock.BANDWIDTH[kind] < 600 for kind in clock.PEAK), "operations a byte"
