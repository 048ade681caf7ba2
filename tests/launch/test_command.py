"""launch.command: exit statuses, errors in one line, and results that can't be written."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ROOT

from launch import command
from launch.flags import Flags

LAUNCHERS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "launch").rglob("*.py")
    if "command.run(main" in path.read_text(encoding="utf-8")
)


def test_all_launchers_can_be_imported_into_one_process_and_list_their_flags(capsys):
    assert len(LAUNCHERS) >= 8
    for name in LAUNCHERS:
        launcher = importlib.import_module(name)
        assert command.call(launcher.main, launcher.FLAGS, ["--help"]) == 0
        text = capsys.readouterr().out
        assert launcher.__doc__.strip() in text
        for row in launcher.FLAGS.rows():
            assert row.help.strip() and f"  --{row.name}  " in text


@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_unknown_flag_is_one_line(name, capsys):
    launcher = importlib.import_module(name)
    assert command.call(launcher.main, launcher.FLAGS, ["--compile_cahce=x"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: there is no flag --compile_cahce; did you mean --compile_cache?\n")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_argument_that_is_not_utf8_is_one_line(name, capsys):
    launcher = importlib.import_module(name)
    for flag in (row.name for row in launcher.FLAGS.rows()):
        assert command.call(launcher.main, launcher.FLAGS, [f"--{flag}=caf\udce9"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == f"error: the argument '--{flag}=caf\\udce9' isn't valid UTF-8\n"


@pytest.fixture
def flags():
    return Flags(command.FLAGS)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines"), 2, "error: two lines"),
        (FileNotFoundError("gone"), 2, "error: gone"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (KeyError("a fault"), 1, "KeyError: 'a fault'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_has_its_status(error, status, line, flags, capsys):
    def main():
        raise error

    assert command.call(main, flags, []) == status
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == line


def test_the_result_is_one_json_line(flags, capsys):
    assert command.call(lambda: {"text": "a\nb"}, flags, []) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "a\nb"}


def test_a_missing_package_is_named_with_its_extra():
    command.needs("json", "viz", "a figure")
    with pytest.raises(ValueError, match=r"a figure needs no_such_package: pip install 'diffusion_lm\[viz\]'"):
        command.needs("no_such_package", "viz", "a figure")


SCRIPT = """
from launch import command
from launch.flags import Flags
def main():
    print("working", file=__import__("sys").stderr)
    return {"result": "x" * 100_000}
command.run(main, Flags(command.FLAGS))
"""


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("redirection", "cause"),
    [
        (">&-", "standard output is closed"),
        (">/dev/full", "No space left on device"),
        ("| true", "Broken pipe"),
        (">&- 2>&-", ""),
    ],
)
def test_a_result_that_can_not_be_written_is_an_error(redirection, cause, tmp_path):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "script.py").write_text(SCRIPT)
    line = f"set -o pipefail; {sys.executable} {tmp_path}/script.py {redirection}"
    done = subprocess.run(["bash", "-c", line], env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    lines = [text for text in done.stderr.splitlines() if text != "working"]
    assert len(lines) == bool(cause) and all(line.startswith("error: ") and cause in line for line in lines)
    assert ("working" in done.stderr) == (redirection[:3] not in (">&-",))  # nothing is begun that would be lost


def test_an_interruption_during_imports_is_one_line(tmp_path):
    """^C while JAX is imported, which takes most of a launcher's first second, and catches what its parts raise."""
    pressed = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "jax.py").write_text(pressed)
    done = subprocess.run(
        [sys.executable, "-m", "launch.sample", "--workdir=x"], env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode not in (0, 1, 2) and done.stderr == "error: interrupted\n" and not done.stdout


COMPILES = """
import itertools, os, signal, sys, threading
import jax, jax.numpy as jnp
from launch import command

def main():
    def program(x):
        for i in range(400):
            x = jnp.sin(x @ x) + i
        return x

    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    for n in itertools.count():
        jax.jit(lambda x: program(x) + n)(jnp.ones((8, 8)))

command.run(main, command.FLAGS)
"""


def test_an_interruption_while_programs_are_compiled_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (130, "error: interrupted\n", "")
