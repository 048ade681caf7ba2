"""The generated pages are those that the code gives."""

import re

import pytest
from support.pages import ROOT

from launch import docs

PAGES = docs.pages()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_fresh(name):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == PAGES[name], f"docs/{name} is out of date: run python -m launch.docs"


def test_the_repository_has_one_name_and_colab_opens_every_notebook():
    named = docs.named()
    assert sorted(named) == ["README.md", *sorted(f"colabs/{path.name}" for path in (ROOT / "colabs").glob("*.ipynb"))]
    for name, text in named.items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name}: run python -m launch.docs"
    links = re.findall(r"\]\(https://colab\.research\.google\.com/github/([^)]+)\)", named.pop("README.md"))
    assert sorted(links) == [f"{docs.REPOSITORY}/blob/main/{notebook}" for notebook in named]
    assert all(f"git+https://github.com/{docs.REPOSITORY}\\" in text for text in named.values())


def test_every_config_field_has_a_meaning():
    empty = [line for line in PAGES["config.md"].splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not empty, "describe these fields in their class's docstring:\n" + "\n".join(empty)


def test_every_flag_has_a_meaning():
    empty = [line for line in PAGES["cli.md"].splitlines() if line.startswith("| `--") and line.endswith("|  |")]
    assert not empty, "\n".join(empty)
