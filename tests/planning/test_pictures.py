"""The picture of a decoding order: its contents can be read in the SVG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from diffusion_lm.planning.pictures import CellHistory, GridHistory, cell_histories, decoding_order_picture

FRAMES = [["1", "", "", ""], ["1", "3", "", ""], ["", "2", "1", ""], ["1", "2", "4", ""]]
RIGHT = ["1", "2", "3", "4"]


def grid(**changes):
    return GridHistory(
        **{"title": "random <4>", "given": [True, False, False, False], "right": RIGHT, "frames": FRAMES} | changes
    )


def test_a_cell_has_the_step_of_its_last_commit():
    assert cell_histories(FRAMES) == [
        CellHistory("1", 4, ("1",)),
        CellHistory("2", 3, ("3",)),
        CellHistory("4", 4, ("1",)),
        CellHistory("", 0, ()),
    ]
    assert cell_histories([["5"], [""]]) == [CellHistory("", 0, ("5",))]


def test_steps_texts_and_marks_are_in_the_picture(tmp_path):
    decoding_order_picture([grid(), grid(title="confidence")], tmp_path / "grid.svg", columns=2, box=(1, 2))
    page = (tmp_path / "grid.svg").read_text()
    root = ElementTree.fromstring(page)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("random <4>") == 1 and texts.count("confidence") == 1
    one = page[page.index("random") : page.index("confidence</text>")]
    assert re.findall(r'class="p f-soft"[^>]*>(\d+)<', one) == ["4", "3", "4"]
    assert re.findall(r'class="d g f-given"[^>]*>(.)<', one) == ["1"]
    assert re.findall(r'class="d f-ink"[^>]*>(.)<', one) == ["2"]
    assert re.findall(r'class="d f-wrong"[^>]*>(.?)<', one) == ["4", ""]
    assert re.findall(r'class="x f-(\w+)"[^>]*>(.)<', one) == [
        ("wrong", "3"),
        ("wrong", "1"),
    ]  # not the 1 that is committed again
    assert one.count("n s-wrong") == 2  # a wrong cell, and one never committed


def test_later_is_darker(tmp_path):
    decoding_order_picture([grid()], tmp_path / "grid.svg", columns=2)
    first, second, third, never = re.findall(r'fill-opacity="([\d.]+)"', (tmp_path / "grid.svg").read_text())
    assert float(never) == 0 < float(second) < float(third) == float(first)


def test_a_cell_appears_with_its_step_and_what_is_given_is_there_before(tmp_path):
    still, moving = tmp_path / "still.svg", tmp_path / "moving.svg"
    decoding_order_picture([grid()], still, columns=2)
    decoding_order_picture([grid()], moving, columns=2, seconds_per_step=0.5)
    page = moving.read_text()
    root = ElementTree.fromstring(page)
    cells = [g for g in root.iter("{http://www.w3.org/2000/svg}g") if g.get("class")]
    assert [g.get("class") for g in cells] == ["s4", "s3", "s4", "s0"]
    hidden = ["".join(g.itertext()) for g in cells]
    assert hidden == ["4", "233", "441", ""]  # digit, step, struck out text; the given 1 is outside
    found = re.findall(r"\.s(\d){animation:s\d ([\d.]+)s step-end infinite}@keyframes s\d{0%{opacity:0}([\d.]+)%", page)
    assert found == [(str(step), "3.5", f"{100 * step / 7:.2f}") for step in (1, 2, 3, 4)]
    assert "@keyframes" not in still.read_text() and "prefers-reduced-motion:no-preference" in page


def test_bad_grids_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a grid needs"):
        grid(right=["1"])
    with pytest.raises(ValueError, match="a grid needs"):
        grid(frames=[])
    with pytest.raises(ValueError, match="whole rows"):
        decoding_order_picture([grid()], tmp_path / "grid.svg", columns=3)
    with pytest.raises(ValueError, match="give at least one"):
        decoding_order_picture([], tmp_path / "grid.svg", columns=2)
    with pytest.raises(ValueError, match=r"ends in \.svg"):
        decoding_order_picture([grid()], tmp_path / "grid.png", columns=2)
    with pytest.raises(ValueError, match="seconds_per_step"):
        decoding_order_picture([grid()], tmp_path / "grid.svg", columns=2, seconds_per_step=-1.0)
