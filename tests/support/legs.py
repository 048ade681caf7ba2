"""Legs of the suite "accelerator" that end in every way."""

import json
import math
import os
import signal
import time
from pathlib import Path

from launch.benchmarks.accelerator_cases import Measured


def fails(sizes, left):
    yield Measured(name="a row before it failed", value=math.nan)
    raise ValueError("there is no such kernel")


def killed(sizes, left):
    yield Measured(name=sizes.name, value=left())
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(sizes, left):
    time.sleep(600)
    yield Measured(name="never")


def reads(sizes, left):
    """What the file holds while this leg runs; its path is in a variable."""
    print("a library's chatter")
    so_far = json.loads(Path(os.environ["SO_FAR"]).read_text())
    yield Measured(name=" ".join(row["leg"] for row in so_far["rows"]), passed=so_far["complete"])
