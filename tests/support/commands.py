"""The launchers as commands and in this process, and settings small enough to train in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch import command

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"Line {i}: the {w} sat on the mat.\n\n" for i in range(80) for w in ("cat", "dog", "hen", "owl"))
SMALL = ("data.document_unit=paragraph", "data.seq_len=64", "data.tokenizer_kind=char", "model.width=32",
         "model.layers=2", "model.heads=2", "objective.block_size=16", "train.steps=6", "checkpoint.save_every=3",
         "train.eval_every=0", "exec.compute_dtype=float32")  # fmt: skip
SUDOKU = """
from configs.planning import quick
from diffusion_lm.config import override

def get_config():
    small = "model.width=16 model.layers=1 model.heads=2 model.mlp_dim=16 train.steps=2 train.batch_size=2"
    return override(quick.get_config(), [*small.split(), "checkpoint.save_every=2", "data.workers=0"])
"""  # a file for the quickstart's second part


def environment(home: Path) -> dict[str, str]:
    """Variables of a command in a process of its own, which finds the packages beside the tests."""
    # Half of the time would go into optimising programs that run once. --compile_cache keeps all, however quick.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **quick, "JAX_PLATFORMS": "cpu", "HOME": str(home), "PYTHONPATH": path}


def launch(name: str, *arguments: str, home: Path) -> subprocess.CompletedProcess:
    """Runs a launcher in a process of its own."""
    command = [sys.executable, "-m", f"launch.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=300)


def call(capsys, launcher, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a launcher's module, run in this process."""
    capsys.readouterr()
    status = command.call(launcher.main, launcher.FLAGS, arguments)
    return status, *capsys.readouterr()


def result(capsys, launcher, *arguments: str) -> dict:
    """The JSON object that a launcher's module, run in this process, ends with; it must succeed."""
    status, out, err = call(capsys, launcher, *arguments)
    assert status == 0, err
    return json.loads(out.splitlines()[-1])
