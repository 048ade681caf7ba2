"""Links, file names, class names, config keys and flags that the documentation mentions exist."""

import ast
import importlib
import re

import pytest
from support.pages import FENCE, GENERATED, PAGES, ROOT, inline

from diffusion_lm.config import Config
from launch import docs

WRITTEN = [page for page in PAGES if page.name not in GENERATED]
PLACES = ("", "diffusion_lm", "tests", "configs", "docs")
MADE_UP = re.compile(r"NAME|FILE|my_|work/|runs/|checkpoints/|metrics\.jsonl|input\.txt|canvas\.html|notes/|\.jsonl")


def name(page):
    return page.relative_to(ROOT).as_posix()


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {anchor(h) for h in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, part = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{name(page)}: {target}"
        if part:
            assert part in anchors(linked.read_text(encoding="utf-8")), f"{name(page)}: {target}"


def classes() -> set[str]:
    found = set()
    for folder in ("diffusion_lm", "launch", "configs", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    found.add(node.name)
    return found


def test_named_files_exist():
    for page in WRITTEN:
        for code in inline(page):
            for path in re.findall(r"(?<![\w./*-])(?:[\w-]+/)*[\w-]+\.(?:py|md|svg)\b", code):
                if not MADE_UP.search(code):
                    assert any((ROOT / place / path).exists() for place in PLACES), f"{name(page)}: {path}"


def test_named_classes_exist():
    known = classes() | {"KIND", "NAME"}
    for page in WRITTEN:
        for code in inline(page):
            for cls in re.findall(r"^([A-Z][a-z]+[A-Za-z]*)(?:\(.*\))?$", code):
                assert cls in known, f"{name(page)}: {cls}"


def test_named_config_keys_exist():
    known = set(re.findall(r"^\| `(\w+)`", docs.config_page(), re.MULTILINE))
    groups = "|".join(Config.__dataclass_fields__)
    for page in WRITTEN:
        for key in re.findall(rf"(?<![\w./])(?:{groups})\.([a-z_][\w.]*)", "\n".join(inline(page))):
            assert key == "py" or all(part in known for part in key.rstrip(".").split(".")), f"{name(page)}: {key}"


def test_named_flags_exist():
    known = {flag for module in docs.launchers() for flag in importlib.import_module(module).FLAGS.values}
    others = {
        "worker",
        "zone",
        "command",
        "cluster",
        "workload",
        "check",
        "nodes",
        "xla_gpu_exclude_nondeterministic_ops",
        "all",  # of pytest: --all-cases
    }
    for page in WRITTEN:
        for code in inline(page):
            for flag in re.findall(r"(?<![\w-])--([a-z]\w+)", code):
                assert flag in known | others, f"{name(page)}: --{flag}"
