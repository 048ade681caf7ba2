"""Pictures are well formed, small, and show the passes they were asked for."""

import re
import sys
from xml.etree import ElementTree

import pytest

from diffusion_lm.visualize.frames import Trace
from diffusion_lm.visualize.plots import curve, denoising_picture

SVG = "{http://www.w3.org/2000/svg}"


def drawn(trace, path, **options):
    denoising_picture(trace, path, **options)
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def test_each_pass_asked_for_is_a_panel(make_story, tmp_path):
    picture = drawn(make_story(128), tmp_path / "a.svg", passes=(0, 3, 12))
    heads = [text.text for text in picture.iter(SVG + "text") if text.get("class", "").startswith("h ")]
    assert heads == ["pass 0 of 12", "pass 3 of 12", "pass 12 of 12"]


def test_the_last_panel_holds_all_the_text(make_story, tmp_path):
    trace = make_story(256)
    panel = list(drawn(trace, tmp_path / "a.svg").iter(SVG + "g"))[-1]
    shown = "".join(text.text for text in panel.iter(SVG + "text") if re.match("t-", text.get("class")))
    assert re.sub(r"[\s↵]", "", shown) == re.sub(r"\s", "", "".join(trace.frames[-1].tokens))


def test_a_large_canvas_stays_small_and_inside_the_picture(make_story, tmp_path):
    picture = drawn(make_story(1024), tmp_path / "a.svg", passes=(0, 3, 6, 9, 12), across=3)
    assert (tmp_path / "a.svg").stat().st_size < 300_000
    width, height = float(picture.get("width")), float(picture.get("height"))
    for group in picture.iter(SVG + "g"):
        x, y = map(float, re.findall(r"[\d.]+", group.get("transform")))
        panel = group.find(SVG + "rect")
        assert x + float(panel.get("width")) <= width and y + float(panel.get("height")) <= height
        for text in group.iter(SVG + "text"):
            right = float(text.get("x")) + float(text.get("textLength") or 0)
            assert right <= float(panel.get("width")) and float(text.get("y")) <= float(panel.get("height"))


def test_hostile_text_stays_text(make_story, tmp_path):
    trace = make_story(64, text="<b>&amp;\x00\x1b]]></svg> \ud800\u2028 ")
    trace = Trace(title="<&\x00\ud800", frames=trace.frames)
    tags = {element.tag.removeprefix(SVG) for element in drawn(trace, tmp_path / "a.svg").iter()}
    assert tags <= {"svg", "title", "desc", "style", "g", "rect", "text", "path"}


@pytest.mark.parametrize(
    "options", [{"passes": (13,)}, {"passes": (-1,)}, {"passes": ()}, {"across": 0}, {"columns": 1}]
)
def test_a_picture_that_cannot_be_is_refused(make_story, tmp_path, options):
    with pytest.raises(ValueError):
        denoising_picture(make_story(64), tmp_path / "a.svg", **options)
    assert not list(tmp_path.iterdir())


def test_only_an_svg_is_drawn(make_story, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.svg"):
        denoising_picture(make_story(64), tmp_path / "a.png")


def test_a_curve_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    curve([1, 2, 3], {"train": [3.0, 2.0, 1.5], "valid": [3.1, 2.2, 1.9]}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="'train' has 2 values for 3"):
        curve([1, 2, 3], {"train": [3.0, 2.0]}, tmp_path / "b.png")
    with pytest.raises(ValueError, match="supported"):
        curve([1], {"train": [3.0]}, tmp_path / "loss.what")


def test_a_place_is_marked(tmp_path):
    pytest.importorskip("matplotlib")
    curve([1, 3], {"a": [1.0, 3.0]}, tmp_path / "plain.svg")
    curve([1, 3], {"a": [1.0, 3.0]}, tmp_path / "marked.svg", marks={"here": 2.0})
    plain, marked = ((tmp_path / f"{name}.svg").read_text() for name in ("plain", "marked"))
    assert "<!-- here -->" in marked and marked.count("stroke-dasharray") == plain.count("stroke-dasharray") + 1


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion_lm\[viz\]'"):
        curve([1], {"train": [1.0]}, tmp_path / "a.png")


def test_no_two_of_many_curves_look_alike(tmp_path):
    pytest.importorskip("matplotlib")
    curve([0, 1], {f"line {i}": [i, i + 1] for i in range(14)}, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    drawn = re.findall(r'clip-path="[^"]*" style="(fill: none; [^"]*stroke-width: 1.6[^"]*)"', picture)
    assert len(drawn) == len(set(drawn)) == 14
