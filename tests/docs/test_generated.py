"""The generated pages are those that the code gives."""

import pytest
from support.pages import ROOT

from launch import docs

PAGES = docs.pages()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_fresh(name):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == PAGES[name], f"docs/{name} is out of date: run python -m launch.docs"


def test_every_config_field_has_a_meaning():
    empty = [line for line in PAGES["config.md"].splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not empty, "describe these fields in their class's docstring:\n" + "\n".join(empty)


def test_every_flag_has_a_meaning():
    empty = [line for line in PAGES["cli.md"].splitlines() if line.startswith("| `--") and line.endswith("|  |")]
    assert not empty, "\n".join(empty)
