"""What the house promises of every file, read off the source."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted(
    path for folder in ("diffusion_lm", "configs", "launch", "tests") for path in (ROOT / folder).rglob("*.py")
)
PYTHON += [ROOT / "setup.py"]
LIBRARY = [path for path in PYTHON if ROOT / "diffusion_lm" in path.parents and path.name != "__init__.py"]
READ = [
    *PYTHON,
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("*.toml"),
    *ROOT.rglob("colabs/*.ipynb"),
    *ROOT.rglob("diffusion_lm/*.html"),
]
TESTED = re.compile(r"^<!-- tests -->\n```[^\n]*\n(.+?)\n```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_public_things_say_what_they_are(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    silent = [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), f"{name(path)} doesn't say what it is"
    assert not silent, f"{name(path)}: no docstring on {', '.join(silent)}"


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_no_file_is_too_long_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, f"{name(path)}: two nouns?"


def test_no_path_of_one_machine():
    """Only tests may make up places; what ships names none."""
    place = re.compile(r"(?:^|[^.\w/<])/(?:work|tmp|root|home|Users|mnt|opt)/", re.MULTILINE)
    for path in READ:
        if ROOT / "tests" not in path.parents:
            assert not place.search(path.read_text(encoding="utf-8")), name(path)


def test_no_tensorflow():
    banned = {"tensorflow", "tensorflow_datasets", "tf_keras", "clu"}
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {module.split(".")[0] for module in modules}, name(path)


def test_what_can_be_installed():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"]
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = {ast.literal_eval(key) for key in given["extras_require"].keys}
    assert extras >= {"test", "viz", "tpu", "cuda", "bench"}
    needed = [re.split(r"[<>=\[]", package)[0] for package in ast.literal_eval(given["install_requires"])]
    assert {"jax", "flax", "optax", "orbax-checkpoint", "sentencepiece", "absl-py", "grain"} <= set(needed)
    assert not any(package.startswith("tensorflow") for package in needed)
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:2] == ["Apache", "License"]


def test_the_readme_says_how_it_is_tested():
    found = TESTED.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) == 1, "README.md: one fenced block right after a line <!-- tests -->"
    assert "pip install" in found[0] and "pytest" in found[0]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def ci(tmp_path, readme):
    """.ci/run in a project of that README, started from elsewhere and without an input."""
    (tmp_path / "project/.ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", tmp_path / "project/.ci/run")
    (tmp_path / "project/README.md").write_text(readme)
    (tmp_path / "temporary").mkdir()
    return subprocess.run(
        [tmp_path / "project/.ci/run"],
        env={**os.environ, "CI": "true", "TMPDIR": str(tmp_path / "temporary")},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("readme", ["", "# x\n\n```\necho never\n```\n", "<!-- tests -->\n\n```\necho never\n```\n"])
def test_ci_says_that_there_is_no_command(readme, tmp_path):
    done = ci(tmp_path, readme)
    assert done.returncode == 2 and done.stdout == ""
    assert "<!-- tests -->" in done.stderr and done.stderr.count("\n") == 1


CHOSEN = {0: [], 1: [0], 2: [0, 8], 3: [0, 4, 8], 9: list(range(9)), 20: list(range(9))}


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("count", CHOSEN)
def test_of_a_test_with_many_cases_some_run(count, everything, pytestconfig, monkeypatch):
    class Item:
        path, originalname = "test_a.py", "test_a"

        def get_closest_marker(self, name):
            return getattr(pytest.mark, name)(count).mark

    class Plain(Item):
        def get_closest_marker(self, name):
            return None

    marked, plain = [Item() for _ in range(9)], Plain()
    items = [plain, *marked]
    monkeypatch.setattr(pytestconfig.option, "all_cases", everything)
    monkeypatch.setattr(pytestconfig, "args", ["tests"])
    monkeypatch.setattr(pytestconfig.hook, "pytest_deselected", lambda items: None)
    chosen = marked if everything else [marked[i] for i in CHOSEN[count]]
    pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py")).pytest_collection_modifyitems(
        pytestconfig, items
    )
    assert items == [plain, *chosen]


def test_ci_runs_the_command_in_an_environment_of_its_own(tmp_path):
    command = "echo in $(python -c 'import sys; print(sys.prefix)') &&\n  pwd\nfalse\necho never"
    done = ci(tmp_path, f"# x\n```\necho other\n```\n<!-- tests -->\n```sh\n{command}\n```\n```\necho after\n```\n")
    where, folder = done.stdout.splitlines()
    assert where.startswith(f"in {tmp_path}/temporary/") and Path(folder) == tmp_path / "project"
    assert done.returncode == 1, "a command that fails stops it"
    assert list((tmp_path / "temporary").iterdir()) == [], "the environment is gone"
