"""One process holds a folder; a dead owner's lock is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from diffusion_lm import lock


def owned_by(path, **owner):
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": None} | owner))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_held_while_the_block_runs(tmp_path):
    path = tmp_path / "new" / lock.NAME
    with lock.hold(path):
        with pytest.raises(lock.InUseError) as error, lock.hold(path):
            pass
        line = str(error.value)
        assert f"process {os.getpid()} on {socket.gethostname()}" in line and f"delete {path}" in line
        assert "\n" not in line
        with pytest.raises(lock.InUseError):
            lock.check(path)
    lock.check(path)
    with lock.hold(path):
        pass
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_damaged_file_holds_nothing(tmp_path, content):
    path = tmp_path / lock.NAME
    path.write_text(content)
    lock.check(path)
    with lock.hold(path):
        pass


def test_a_dead_owner_is_replaced(tmp_path):
    path = tmp_path / lock.NAME
    for owner in ({"pid": dead_pid()}, {"started": "another boot 1"}):  # gone; its id belongs to a later process
        owned_by(path, **owner)
        with lock.hold(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_an_owner_on_another_host_is_believed_to_live(tmp_path):
    path = tmp_path / lock.NAME
    owned_by(path, host="elsewhere", pid=dead_pid())
    with pytest.raises(lock.InUseError, match="on elsewhere"), lock.hold(path):
        pass


def test_waiting(tmp_path):
    path, order = tmp_path / lock.NAME, []

    def later():
        with lock.hold(path, wait=True):
            order.append("second")

    with lock.hold(path):
        thread = threading.Thread(target=later)
        thread.start()
        time.sleep(0.7)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


COUNTER = """
import pathlib, sys, time
from diffusion_lm import lock
folder = pathlib.Path(sys.argv[1])
for _ in range(20):
    with lock.hold(folder / lock.NAME, wait=True):
        count = int((folder / "count").read_text())
        time.sleep(0.002)
        (folder / "count").write_text(str(count + 1))
"""


def test_of_several_processes_one_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "count").write_text("0")
    owned_by(tmp_path / lock.NAME, pid=dead_pid())  # all want to take it over at once
    script = "import diffusion_lm.lock as l; l.POLL_SECONDS = 0.001\n" + COUNTER
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "80"
