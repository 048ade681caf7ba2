"""Pictures are well formed, small, and show the frames they were asked for."""

import re
from xml.etree import ElementTree

import pytest

from diffusion_lm.visualize.frames import Trace
from diffusion_lm.visualize.picture import denoising_picture

SVG = "{http://www.w3.org/2000/svg}"


def drawn(trace, path, **options):
    denoising_picture(trace, path, **options)
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def test_each_frame_is_a_panel(make_trace, tmp_path):
    picture = drawn(make_trace(128), tmp_path / "a.svg", frames=(0, 3, 12))
    heads = [text.text for text in picture.iter(SVG + "text") if text.get("class", "").startswith("h ")]
    assert heads == [f"step {step} of 12" for step in (0, 3, 12)]


def test_the_last_panel_holds_all_the_text(make_trace, tmp_path):
    trace = make_trace(256)
    panel = list(drawn(trace, tmp_path / "a.svg").iter(SVG + "g"))[-1]
    shown = "".join(text.text for text in panel.iter(SVG + "text") if re.match("t-", text.get("class")))
    assert re.sub(r"[\s↵]", "", shown) == re.sub(r"\s", "", "".join(trace.frames[-1].tokens))


def test_a_large_canvas_stays_small_and_inside_the_picture(make_trace, tmp_path):
    picture = drawn(make_trace(1024), tmp_path / "a.svg", frames=(0, 3, 6, 9, 12), across=3)
    assert (tmp_path / "a.svg").stat().st_size < 300_000
    width, height = float(picture.get("width")), float(picture.get("height"))
    for group in picture.iter(SVG + "g"):
        x, y = map(float, re.findall(r"[\d.]+", group.get("transform")))
        panel = group.find(SVG + "rect")
        assert x + float(panel.get("width")) <= width and y + float(panel.get("height")) <= height
        for text in group.iter(SVG + "text"):
            right = float(text.get("x")) + float(text.get("textLength") or 0)
            assert right <= float(panel.get("width")) and float(text.get("y")) <= float(panel.get("height"))


def test_hostile_text_stays_text(make_trace, tmp_path):
    trace = make_trace(64, text="<b>&amp;\x00\x1b]]></svg> \ud800\u2028 ")
    trace = Trace(title="<&\x00\ud800", frames=trace.frames)
    tags = {element.tag.removeprefix(SVG) for element in drawn(trace, tmp_path / "a.svg").iter()}
    assert tags <= {"svg", "title", "desc", "style", "g", "rect", "text", "path"}


@pytest.mark.parametrize(
    "options", [{"frames": (13,)}, {"frames": (-1,)}, {"frames": ()}, {"across": 0}, {"columns": 1}]
)
def test_bad_options_are_refused(make_trace, tmp_path, options):
    with pytest.raises(ValueError):
        denoising_picture(make_trace(64), tmp_path / "a.svg", **options)
    assert not list(tmp_path.iterdir())


def test_only_an_svg_is_drawn(make_trace, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.svg"):
        denoising_picture(make_trace(64), tmp_path / "a.png")
