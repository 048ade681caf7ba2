"""The picture of a grid being filled: what is in it can be read off the SVG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from diffusion_lm.planning.pictures import Cell, Filling, cells, filling_picture

FRAMES = [["1", "", "", ""], ["1", "3", "", ""], ["", "2", "1", ""], ["1", "2", "4", ""]]
RIGHT = ["1", "2", "3", "4"]


def grid(**changes):
    return Filling(
        **{"title": "random <4>", "given": [True, False, False, False], "right": RIGHT, "frames": FRAMES} | changes
    )


def test_a_cell_is_known_by_its_last_writing():
    assert cells(FRAMES) == [Cell("1", 4, ("1",)), Cell("2", 3, ("3",)), Cell("4", 4, ("1",)), Cell("", 0, ())]
    assert cells([["5"], [""]]) == [Cell("", 0, ("5",))]


def test_passes_texts_and_marks_are_in_the_picture(tmp_path):
    filling_picture([grid(), grid(title="confidence")], tmp_path / "grid.svg", columns=2, box=(1, 2))
    page = (tmp_path / "grid.svg").read_text()
    root = ElementTree.fromstring(page)
    said = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert said.count("random <4>") == 1 and said.count("confidence") == 1
    one = page[page.index("random") : page.index("confidence</text>")]
    assert re.findall(r'class="p f-soft"[^>]*>(\d+)<', one) == ["4", "3", "4"]
    assert re.findall(r'class="d g f-given"[^>]*>(.)<', one) == ["1"]
    assert re.findall(r'class="d f-ink"[^>]*>(.)<', one) == ["2"]
    assert re.findall(r'class="d f-wrong"[^>]*>(.?)<', one) == ["4", ""]
    assert re.findall(r'class="x f-(\w+)"[^>]*>(.)<', one) == [
        ("wrong", "3"),
        ("wrong", "1"),
    ]  # not the 1 that stands there again
    assert one.count("n s-wrong") == 2  # a wrong one, and one that nobody wrote


def test_later_is_darker(tmp_path):
    filling_picture([grid()], tmp_path / "grid.svg", columns=2)
    first, second, third, never = re.findall(r'fill-opacity="([\d.]+)"', (tmp_path / "grid.svg").read_text())
    assert float(never) == 0 < float(second) < float(third) == float(first)


def test_what_makes_no_picture(tmp_path):
    with pytest.raises(ValueError, match="a filling needs"):
        grid(right=["1"])
    with pytest.raises(ValueError, match="a filling needs"):
        grid(frames=[])
    with pytest.raises(ValueError, match="whole rows"):
        filling_picture([grid()], tmp_path / "grid.svg", columns=3)
    with pytest.raises(ValueError, match="give one at least"):
        filling_picture([], tmp_path / "grid.svg", columns=2)
    with pytest.raises(ValueError, match=r"ends in \.svg"):
        filling_picture([grid()], tmp_path / "grid.png", columns=2)
