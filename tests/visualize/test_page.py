"""The page needs nothing else, and no model output breaks it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diffusion_lm.visualize.frames import Frame, Trace
from diffusion_lm.visualize.page import write_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"',
    "'",
    "\\",
    "\u2028",
    "\u2029",
    "🙂",
    "&lt;",
    "]]>",
]
HOSTILE += ["\x00", "\x1b[2J", "\ud800", "\u202e", "{{trace}}", "{{text}}", "\n", "", " a\n", "</pre>"]


class Page(HTMLParser):
    """Collects tags, attributes and the text of each element that has an id or is a script or style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in ("meta", "link", "input", "path"):
            self.open.append((tag, dict(attributes).get("id") or tag))

    def handle_startendtag(self, tag, attributes):  # an SVG's <path/>
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1][1]] = self.texts.get(self.open[-1][1], "") + data


def written(trace, path):
    write_page(trace, path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    return text, page, json.loads(page.texts["trace"])


def hostile_trace():
    n = len(HOSTILE)
    frames = [
        Frame(tokens=[""] * n, state=np.zeros(n, int), confidence=np.full(n, np.nan), canvas=0, step=0),
        Frame(tokens=HOSTILE, state=np.ones(n, int), confidence=np.linspace(0, 1, n), canvas=0, step=1),
    ]
    return Trace(title="</title><b>", subtitle="</script>", frames=frames, meta={"</script>": "<img src=x>"})


def replayed(data):
    """Frames as (texts, states, confidences), from the page's JSON."""
    cells = {}
    for frame in data["frames"]:
        cells.update({i: (data["texts"][index], confidence) for i, index, confidence in frame["set"]})
        texts, confidence = zip(*(cells[i] for i in range(len(frame["state"]))), strict=True)
        yield texts, [int(s) for s in frame["state"]], [np.nan if c is None else c for c in confidence]


@pytest.mark.parametrize("n", [256, 1024])
def test_the_page_holds_every_frame(make_trace, tmp_path, n):
    trace = make_trace(n)
    text, _, data = written(trace, tmp_path / "page.html")
    for frame, (texts, state, confidence) in zip(trace.frames, replayed(data), strict=True):
        assert texts == tuple(frame.tokens)
        np.testing.assert_array_equal(state, frame.state)
        np.testing.assert_allclose(confidence, frame.confidence, atol=1e-4)
    assert (data["title"], data["subtitle"], data["meta"]["seed"]) == (trace.title, trace.subtitle, "0")
    assert len(text) < 120_000


def test_hostile_tokens_come_back_and_break_nothing(make_trace, tmp_path):
    _, page, data = written(hostile_trace(), tmp_path / "page.html")
    _, plain, _ = written(make_trace(64), tmp_path / "plain.html")
    assert page.tags == plain.tags and page.attributes == plain.attributes
    assert page.texts["title"] == "</title><b>"
    assert next(iter(list(replayed(data))[1:]))[0] == tuple(HOSTILE)
    assert page.open == []
    raw = re.search(r'id="trace">(.*?)</script>', (tmp_path / "page.html").read_text(encoding="utf-8"))[1]
    assert raw.isascii() and not re.search("[<>&]", raw)


def test_the_page_loads_nothing_from_elsewhere(make_trace, tmp_path):
    text, page, _ = written(make_trace(256), tmp_path / "page.html")
    assert not re.search(r"https?:|//\w+\.|@import|url\(", text)
    assert {(tag, value) for tag, name, value in page.attributes if name in ("src", "href")} == {("link", "data:,")}
    policy = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content")]
    assert any("default-src 'none'" in value for value in policy)


def test_the_last_frame_can_be_read_without_javascript(make_trace, tmp_path):
    trace = make_trace(256)
    assert written(trace, tmp_path / "page.html")[1].texts["pre"] == "".join(trace.frames[-1].tokens)


def test_a_page_is_written_whole_or_not_at_all(make_trace, tmp_path):
    trace = make_trace(64)
    with pytest.raises(FileNotFoundError, match=r"folder that exists.*nowhere"):
        write_page(trace, tmp_path / "nowhere" / "page.html")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="may write to"):
        write_page(trace, tmp_path / "file" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(IsADirectoryError, match="may write to"):
        write_page(trace, tmp_path / "folder.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.html"]
    write_page(trace, tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.html"]


def test_an_older_page_stays_where_the_disk_fills_up(make_trace, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("older")

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device.*page\.html"):
        write_page(make_trace(64), tmp_path / "page.html")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["older"]
