"""The error lines of docs/troubleshooting.md are those that the code raises."""

import re

import pytest
from support.pages import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| `([^`]+)` \| [^|]+ \| [^|]+ \|$", PAGE, re.MULTILINE)
FILES = [path for folder in ("diffusion_lm", "launch") for path in (ROOT / folder).rglob("*.py")]
# literals that Python joins, without the values between them
SOURCE = re.sub(r'"\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in FILES))
SOURCE = re.sub(r"\{[^{}]*\}", "...", SOURCE)


@pytest.mark.parametrize("line", LINES)
def test_error_line_is_in_the_code(line):
    for part in line.split("..."):
        assert part.strip() in SOURCE, part


def test_there_are_lines():
    assert len(LINES) > 30
