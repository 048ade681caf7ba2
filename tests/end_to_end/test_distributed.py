"""Several processes train one small network: however stopped and resumed, they match one process alone."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import call

from diffusion_lm.training import metrics
from diffusion_lm.training.checkpoint import Checkpoints
from launch import train

ROOT = Path(__file__).parents[2]
STEPS = 8
SETTINGS = ("data.document_unit=paragraph", "data.seq_len=32", "data.val_fraction=0", "model.width=32",
            "model.layers=2", "model.heads=2", "exec.compute_dtype=float32", f"train.steps={STEPS}",
            "train.batch_size=8", "train.log_every=1", "checkpoint.save_every=3")  # fmt: skip

# The launcher, in a process that does something to itself at some step: `what` names it, as in "stop 2".
PROCESS = """
import os, signal, sys
what, at = sys.argv.pop(1).split()
from diffusion_lm.training import checkpoint, loop
from launch import command, train
save, stacked, calls, savers = checkpoint.Checkpoints.save, loop._stacked, [], []
signals = {"stop": signal.SIGTERM, "die": signal.SIGKILL, "freeze": signal.SIGSTOP}
def saving(self, step, *rest):
    save(self, step, *rest)
    savers.append(self)
    if what == "die-saving" and step == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
def next_batch(batches):
    calls.append(1)
    if len(calls) == int(at) and what in signals:
        [saver.wait() for saver in savers]
        os.kill(os.getpid(), signals[what])
    return stacked(batches)
checkpoint.Checkpoints.save, loop._stacked = saving, next_batch
sys.argv[0] = "train"
command.run(train.main, train.FLAGS)
"""


def start(
    workdir: Path, *, processes: int, mesh: tuple[str, ...] = (), last_does: str = "nothing 0", last_flags=()
) -> list:
    """Processes that train in `workdir`, of one device each; the last of them does something to itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = (*SETTINGS, *(f"mesh.{axis}" for axis in mesh), f"data.path={workdir.parent}/text.txt")
    flags = [
        "--config=configs/tinyshakespeare.py:masked", f"--workdir={workdir}", *(f"--set={s}" for s in settings),
        f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", "--host_timeout=8",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return [
        subprocess.Popen(
            [
                sys.executable, "-c", PROCESS, last_does if i == processes - 1 else "nothing 0", *flags,
                f"--process_id={i}", *(last_flags if i == processes - 1 else ()),
            ],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def finish(started: list) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each."""
    try:
        return [(p.wait(timeout=120), *p.communicate()) for p in reversed(started)][::-1]
    finally:
        for process in started:
            process.kill()


def succeed(started: list) -> dict:
    """The result that the first of them printed; the others print none."""
    done = finish(started)
    assert [status for status, _, _ in done] == [0] * len(done), done[0][2][-2000:]
    lines = [[line for line in out.splitlines() if line.startswith("{")] for _, out, _ in done]
    assert [len(found) for found in lines] == [1] + [0] * (len(done) - 1)
    assert all("step " not in error for _, _, error in done[1:])  # nor do they log what the first one logs
    return json.loads(lines[0][0])


@pytest.fixture
def workdir(tmp_path):
    lines = (f"Line {i}: the {w} sat on the mat.\n\n" for i in range(40) for w in ("cat", "dog", "hen", "owl"))
    (tmp_path / "text.txt").write_text("".join(lines))
    return tmp_path / "work"


# Of one process alone, at steps 1 to 8; found once, with jax 0.10.2.
LOSSES = [6.511358, 5.140997, 6.046429, 5.977625, 4.860392, 5.203691, 4.663618, 5.329816]


def assert_as_one_process_alone(workdir: Path):
    rows = [row for row in metrics.read(workdir) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in rows], LOSSES, atol=1e-5, rtol=0)


def test_sigterm_to_one_of_two_saves_once_and_four_on_another_mesh_go_on(workdir):
    stopped = succeed(start(workdir, processes=2, mesh=("data=1", "fsdp=-1"), last_does="stop 2"))
    assert stopped["interrupted"] and 2 <= stopped["steps"] < STEPS
    assert Checkpoints(workdir).steps()[-1] == stopped["steps"]
    assert succeed(start(workdir, processes=4, mesh=("data=2", "tensor=2")))["steps"] == STEPS
    assert_as_one_process_alone(workdir)


@pytest.mark.cases(0)
@pytest.mark.parametrize("how", ["die 5", "die-saving 3"])
def test_kill_9_to_one_of_two_ends_the_other_and_one_alone_goes_on(workdir, how):
    (status, _, said), killed = finish(start(workdir, processes=2, mesh=("data=-1",), last_does=how))
    assert killed[0] == -signal.SIGKILL
    assert status == 1 and said.splitlines()[-1].startswith("error: another host is lost"), said
    assert Checkpoints(workdir).steps() == ([3] if how == "die 5" else [])
    assert succeed(start(workdir, processes=1))["steps"] == STEPS
    assert_as_one_process_alone(workdir)


@pytest.mark.cases(0)
def test_a_process_that_hangs_ends_the_other_in_time(workdir):
    """Its connections stay open: only its heartbeat is missed."""
    first, frozen = start(workdir, processes=2, mesh=("data=-1",), last_does="freeze 3")
    try:
        said = first.communicate(timeout=110)[1]  # most of it is spent until the third step
    finally:
        first.kill()
        frozen.kill()
        frozen.communicate()
    assert first.returncode != 0
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in said


def test_processes_that_were_told_different_things_say_so(workdir):
    for status, _, said in finish(start(workdir, processes=2, mesh=("data=-1",), last_flags=("--set=seed=1",))):
        assert status == 2
        assert said.splitlines()[-1].startswith(
            "error: the processes of this run have different config, tokenizer or text"
        ), said
    assert not workdir.exists()


@pytest.mark.parametrize("flags", [["--coordinator=h:1"], ["--coordinator=h:1", "--num_processes=2", "--process_id=2"]])
def test_half_of_the_flags_is_refused(flags, capsys):
    status, out, err = call(capsys, train, "--config=configs/quickstart.py", "--workdir=none", *flags)
    assert (status, out) == (2, "") and "give all three" in err.splitlines()[-1]
