"""Commands and Python of the documentation: short ones run on one tiny network, the others are parsed."""

import ast
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import re
import sys

import pytest
from support.commands import TEXT
from support.pages import PAGES, ROOT, all_launches, blocks, commands, launches

from diffusion_lm.config import load, override
from launch import command

TINY = (
    "data.document_unit=paragraph", "data.tokenizer_kind=char", "model.width=16", "model.layers=1", "model.heads=2",
    "train.steps=4", "train.batch_size=4", "train.steps_per_call=1", "train.eval_every=0", "checkpoint.save_every=4",
)  # fmt: skip
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in RUN if any(b.language in ("sh", "python") and not b.skipped for b in blocks(page))]


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder like the checkout, with a text and the quickstart's run of a tiny network."""
    home = tmp_path_factory.mktemp("home")
    (home / "configs").symlink_to(ROOT / "configs")
    (home / "notes").mkdir()
    for path in ("input.txt", "notes/a.md"):
        (home / path).write_text(TEXT)
    before = os.getcwd()
    os.chdir(home)
    sys.path.insert(0, str(home))
    run("launch.quickstart")
    yield home
    sys.path.remove(str(home))
    os.chdir(before)


@functools.cache
def run(module: str, *arguments: str) -> None:
    """Runs a command in this process, on tiny settings; one that several pages name runs once."""
    launcher = importlib.import_module(module)
    if "set" in launcher.FLAGS.values:
        quick = module == "launch.quickstart"  # its sudokus: tests/launch/test_quickstart.py
        arguments += tuple(f"--set={s}" for s in (*TINY, *["data.path=input.txt"] * quick))
        arguments += ("--boards=0",) * quick
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = command.call(launcher.main, launcher.FLAGS, arguments)
    assert status == 0, f"python -m {module} {' '.join(arguments)}"
    assert json.loads(out.getvalue().splitlines()[-1])


@pytest.mark.parametrize("page", RUN, ids=name)
def test_page_runs(page, home):
    """In order. A Python block that begins with a file's name is written there; the others are executed."""
    names = {}
    for block in blocks(page):
        if block.skipped:
            continue
        first = block.text.partition("\n")[0]
        if block.language == "python" and re.fullmatch(r"# [\w/]+\.py", first):
            (home / first[2:]).parent.mkdir(exist_ok=True)
            (home / first[2:]).write_text(block.text)
            importlib.invalidate_caches()
        elif block.language == "python":
            exec(compile(block.text, name(page), "exec"), names)
        elif block.language == "sh":
            for module, arguments in launches(block.text):
                run(module, *arguments)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_flags_and_keys_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for module, arguments in all_launches(page):
        launcher = importlib.import_module(module)
        launcher.FLAGS.parse(arguments)
        if "my_package" not in " ".join(arguments):
            check_settings(module, launcher)


def check_settings(module: str, launcher) -> None:
    """Raises ValueError for a --set that its launcher's config doesn't have."""
    if "set" not in launcher.FLAGS.values:
        return
    settings = launcher.FLAGS.values["set"].value
    if module == "launch.planning.scoreboard":
        for task, kind in itertools.product(launcher.TASKS.value, launcher.KINDS.value):
            override(load(f"{launcher.CONFIG.value}:{task}-{kind}"), settings)
    elif "config" in launcher.FLAGS.values:
        override(load(launcher.FLAGS.values["config"].value), settings)
    elif module == "launch.quickstart":
        override(load("configs/quickstart.py"), settings)
    elif module == "launch.compare":
        for words in launcher.KINDS.value:
            kind, *own = words.split(":")
            override(load(f"configs/tinyshakespeare.py:{kind}"), [*settings, *own])
    else:
        raise AssertionError(f"{module} has --set: say which config it changes")


def test_extras_that_are_installed_exist():
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = [k for node in ast.walk(setup) if isinstance(node, ast.Call) for k in node.keywords]
    (extras,) = [k.value for k in keywords if k.arg == "extras_require"]
    known = {ast.literal_eval(key) for key in extras.keys}
    installs = [
        (name(page), " ".join(words))
        for page in PAGES
        for block in blocks(page)
        for words in (commands(block.text) if block.language == "sh" else ())
        if words[:2] == ["pip", "install"]
    ]
    assert installs
    for page, words in installs:
        assert set(re.findall(r"\[(\w+)\]", words)) <= known, f"{page}: {words}"
