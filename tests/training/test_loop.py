import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import toy

from diffusion_lm import lock
from diffusion_lm.training import metrics
from diffusion_lm.training.checkpoint import CheckpointError, Checkpointing, Checkpoints
from diffusion_lm.training.loop import NonFiniteError, Train, run
from diffusion_lm.types import Loss

TRAIN = Train(steps=12, batch_size=4, log_every=1, eval_every=5, ema_decay=0.5)
NOISY = partial(toy.loss, noise=0.3)


def train(workdir, train=TRAIN, loss=NOISY, loader=None, save_every=4, max_to_keep=3):
    return run(
        toy.job(train, loss, loader),
        train,
        workdir,
        Checkpoints(workdir, Checkpointing(save_every=save_every, max_to_keep=max_to_keep)),
    )


def final_state(workdir):
    return Checkpoints(workdir).restore(toy.job(TRAIN).abstract).state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    result = train(workdir)
    return result, metrics.read(workdir), final_state(workdir)


def assert_equals_uninterrupted(workdir, uninterrupted):
    _, rows, state = uninterrupted
    assert metrics.read(workdir) == rows
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), state)


class Stopping(toy.Loader):
    """Sends this process a signal when it is asked for a certain batch."""

    def __init__(self, at, number):
        super().__init__()
        self.at, self.number = at, number

    def __next__(self):
        if self.next == self.at:
            os.kill(os.getpid(), self.number)
        return super().__next__()


def test_rows_and_result(uninterrupted):
    result, rows, _ = uninterrupted
    assert (result.steps, result.interrupted) == (12, False)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "valid/next" in row] == [5, 10, 12]
    assert result.values["loss"] == rows[-2]["loss"]
    assert result.checkpoint.is_dir() and result.checkpoint.name == "12"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, uninterrupted, number):
    before = signal.getsignal(number)
    result = train(tmp_path, loader=Stopping(6, number))
    assert result.interrupted and result.steps == 7  # the update is finished
    assert Checkpoints(tmp_path).steps()[-1] == 7
    assert signal.getsignal(number) == before
    assert train(tmp_path).steps == 12
    assert_equals_uninterrupted(tmp_path, uninterrupted)


def test_a_finished_run_started_again_does_nothing(tmp_path, uninterrupted):
    first = train(tmp_path)
    again = train(tmp_path)
    assert (again.steps, again.interrupted, again.values) == (12, False, first.values)
    assert_equals_uninterrupted(tmp_path, uninterrupted)


def test_fewer_steps_than_are_done_already(tmp_path):
    train(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoints/12 is beyond train.steps=8"):
        train(tmp_path, Train(steps=8, batch_size=4, ema_decay=0.5))


SCRIPT = """
import sys, pathlib, os, signal
sys.path[:0] = [{here!r}, {tests!r}, {root!r}]
import test_loop
from support import toy
from diffusion_lm.training import checkpoint
mode, workdir = sys.argv[1:]
if mode == "save":  # die when step 8 is being written in the background
    save = checkpoint.Checkpoints.save
    def dying(self, step, *rest):
        save(self, step, *rest)
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.Checkpoints.save = dying
test_loop.train(workdir, loader=test_loop.Stopping(10, signal.SIGKILL) if mode == "run" else None)
"""


@pytest.mark.parametrize("mode", ["run", "save"])
def test_kill_9_then_resume_equals_an_uninterrupted_run(tmp_path, uninterrupted, mode):
    here = Path(__file__).parent
    script = SCRIPT.format(here=str(here), tests=str(here.parent), root=str(here.parents[1]))
    done = subprocess.run([sys.executable, "-c", script, mode, str(tmp_path)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    saved = Checkpoints(tmp_path).steps()
    assert saved and saved[-1] <= 8
    train(tmp_path)
    assert_equals_uninterrupted(tmp_path, uninterrupted)


def poisoned(params, key, batch, constants):
    """Infinite at batch number 6, whose first row starts with a known number."""
    is_it = jnp.all(batch.tokens == jnp.asarray(toy.batch_at(6).tokens))
    return {
        k: Loss(sum=jnp.where(is_it, jnp.inf, v.sum), weight=v.weight) for k, v in NOISY(params, key, batch).items()
    }


def test_a_cpu_has_one_call_at_a_time(tmp_path):
    """Each that is queued holds scratch memory of its own, gigabytes where a network is large."""
    job, made, ready = toy.job(TRAIN), [], []

    def slow(values):
        time.sleep(0.02)
        return values

    later = jax.jit(lambda values: jax.pure_callback(slow, jax.ShapeDtypeStruct((1,), jnp.float32), values))

    def step(*arguments):
        ready.append(all(loss.is_ready() for loss in made))
        state, values = job.step(*arguments)
        made.append(later(values["loss"]))
        return state, {**values, "loss": made[-1]}

    run(dataclasses.replace(job, step=step), TRAIN, tmp_path, Checkpoints(tmp_path))
    assert len(ready) == TRAIN.steps and all(ready)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError) as error:
        train(tmp_path, loss=poisoned)
    line = str(error.value)
    assert "step 7" in line and '{"next": 6}' in line and str(tmp_path / "checkpoints" / "4") in line
    assert "\n" not in line
    assert Checkpoints(tmp_path).steps() == [4]
    assert max(row["step"] for row in metrics.read(tmp_path)) == 6


def test_not_finite_in_the_step_that_would_be_saved(tmp_path):
    with pytest.raises(NonFiniteError, match="step 7"):
        train(tmp_path, loss=poisoned, save_every=7)
    assert Checkpoints(tmp_path).steps() == []


def test_several_updates_a_call(tmp_path, uninterrupted):
    """The same losses; rows where log_every says, whatever the calls."""
    together = Train(steps=12, batch_size=4, log_every=3, eval_every=6, ema_decay=0.5, steps_per_call=2)
    train(tmp_path, together)
    rows = [row for row in metrics.read(tmp_path) if "loss" in row]
    assert rows == [row for row in uninterrupted[1] if "loss" in row and row["step"] % 3 == 0]
    with pytest.raises(ValueError, match="steps_per_call"):
        Train(steps=12, eval_every=6, steps_per_call=5)


@pytest.mark.parametrize(("stopped", "together"), [(7, 2), (5, 3), (2, 4)])
def test_a_run_that_was_stopped_between_two_calls_ends_at_its_last_step(tmp_path, uninterrupted, stopped, together):
    """Steps are counted from the one that is resumed: no step too many, and the last checkpoint is there."""
    assert train(tmp_path, loader=Stopping(stopped - 1, signal.SIGTERM)).steps == stopped
    calls = Train(steps=12, batch_size=4, log_every=1, eval_every=0, ema_decay=0.5, steps_per_call=together)
    result = train(tmp_path, calls, save_every=12)
    assert (result.steps, result.interrupted, result.checkpoint.name) == (12, False, "12")
    assert Checkpoints(tmp_path).steps()[-1] == 12 and metrics.read(tmp_path)[-1]["step"] == 12
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), uninterrupted[2])
    assert train(tmp_path, calls, save_every=12).steps == 12  # and it can be started again


def test_two_runs_in_one_workdir(tmp_path):
    with lock.hold(tmp_path / lock.NAME), pytest.raises(lock.InUseError, match=f"process {os.getpid()}"):
        train(tmp_path)
    assert not (tmp_path / metrics.FILE).exists()
    assert train(tmp_path).steps == 12


def test_constants_are_arguments_without_gradient_or_optimizer_state(tmp_path):
    """Any pytree: the update gets them as they are, and what is trained is nothing but the parameters."""
    constants = {"shift": jnp.full(toy.VOCAB, 0.25), "count": jnp.int32(3)}

    def loss(params, key, batch, constants):
        shifted = params | {"bias": params["bias"] + constants["shift"] * constants["count"]}
        return toy.loss(shifted, key, batch)

    job = toy.job(TRAIN, loss, constants=constants)
    result = run(job, TRAIN, tmp_path, Checkpoints(tmp_path))
    assert result.steps == 12
    np.testing.assert_array_equal(constants["shift"], 0.25)  # not donated
    state = final_state(tmp_path)
    assert set(state.params) == {"bias", "table"}
    text = job.step.lower(job.initial(), job.key, toy.stacked(0, TRAIN.batch_size), constants).as_text()
    assert "0.25" not in text  # no number of theirs is compiled in


@pytest.mark.parametrize("stopped", [20, 6])
def test_stops_once_the_held_out_loss_rises_and_keeps_the_lowest(tmp_path, stopped):
    """Also where the run is stopped in between: what was lowest is read from the metrics."""
    losses = iter([5.0, 4.0, 3.0, 4.0, 3.5, 1.0])

    def go(steps):
        how = Train(steps=steps, batch_size=4, eval_every=2, early_stopping_patience=2)
        job = dataclasses.replace(toy.job(how), evaluate=lambda params: {"valid/next": next(losses)})
        return run(job, how, tmp_path, Checkpoints(tmp_path, Checkpointing(save_every=6, max_to_keep=1)))

    if stopped < 20:
        assert go(stopped).best_step == 4
    result = go(20)
    assert (result.steps, result.best_step, result.interrupted) == (8, 4, False)
    assert Checkpoints(tmp_path).steps() == [4, 8]
    rows = [row for row in metrics.read(tmp_path) if "valid/next" in row]
    assert [(row["step"], row["valid/next"]) for row in rows] == [(0, 5.0), (2, 4.0), (4, 3.0), (6, 4.0), (8, 3.5)]
    assert go(20).steps == 8  # nothing is left to do


def test_early_stopping_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match=r"needs train\.eval_every"):
        Train(eval_every=0, early_stopping_patience=1)
    how = Train(steps=2, batch_size=4, eval_every=1, early_stopping_patience=1)
    job = dataclasses.replace(toy.job(how), evaluate=lambda params: {})
    with pytest.raises(ValueError, match="needs held-out data"):
        run(job, how, tmp_path, Checkpoints(tmp_path))


def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path, uninterrupted):
    train(tmp_path, loader=Stopping(6, signal.SIGTERM))
    with open(tmp_path / metrics.FILE, "a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    train(tmp_path)
    assert_equals_uninterrupted(tmp_path, uninterrupted)


def test_progress_goes_to_the_log_without_a_terminal(caplog):
    meter = metrics.ProgressBar(0, 3, seconds_between_lines=0)
    with caplog.at_level(logging.INFO):
        for step in (1, 2, 3):
            time.sleep(0.01)
            meter.show(step, 1.25, 100)
    meter.close()
    assert meter.tokens_per_s > 0
    assert "step 2/3  loss 1.2500" in caplog.text and "tokens/s" in caplog.text and "s left" in caplog.text
