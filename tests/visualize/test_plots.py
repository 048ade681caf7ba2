"""Plots by matplotlib: what is drawn can be read in the SVG, and axes carry real numbers."""

import re
import sys

import pytest

from diffusion_lm.visualize.plots import Line, Panel, curve, panels, tick_label

pytest.importorskip("matplotlib")
LINE = Line([1, 2, 4], [0.1, 0.5, 0.9], [0.05, 0.4, 0.8], [0.2, 0.6, 0.95])


def test_each_chart_has_its_panel(tmp_path):
    path = tmp_path / "page.svg"
    charts = {title: Panel({"masked": LINE}, "denoising steps") for title in ("sudoku", "path", "queens")}
    many = LINE._replace(xs=[9000, 18_000, 36_500])
    charts["sat"] = Panel({"masked": many}, "blanks", log_x=False, levels={"ar": 0.7})
    panels(charts, path, y_label="solved")
    page = path.read_text()
    assert page.count('id="axes_') == 4
    assert page.count("<!-- masked -->") == 4 and page.count("<!-- ar -->") == 1
    for text in (*charts, "denoising steps", "blanks", "9000", "18k", "36.5k", "solved, %", "40"):
        assert f"<!-- {text} -->" in page


def test_a_chart_may_have_levels_only(tmp_path):
    panels({"path": Panel({}, "denoising steps", levels={"ar": 0.7})}, tmp_path / "page.svg", y_label="solved")
    assert "<!-- ar -->" in (tmp_path / "page.svg").read_text()


def test_an_unknown_ending_and_a_page_without_charts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        panels({"a": Panel({"b": LINE}, "x")}, tmp_path / "page.xyz", y_label="y")
    with pytest.raises(ValueError, match="no chart"):
        panels({}, tmp_path / "page.svg", y_label="y")
    assert not list(tmp_path.iterdir())


def test_a_curve_is_written(tmp_path):
    curve([1, 2, 3], {"train": [3.0, 2.0, 1.5], "valid": [3.1, 2.2, 1.9]}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="'train' has 2 values for 3"):
        curve([1, 2, 3], {"train": [3.0, 2.0]}, tmp_path / "b.png")
    with pytest.raises(ValueError, match="supported"):
        curve([1], {"train": [3.0]}, tmp_path / "loss.what")


def test_lines_have_xs_of_their_own(tmp_path):
    lines = {"fast": [3.0, 2.0, 1.5], "slow": [4.0]}
    curve({"fast": [1, 2, 3], "slow": [2]}, lines, tmp_path / "own.svg", log_x=True)
    assert all(f"<!-- {name} -->" in (tmp_path / "own.svg").read_text() for name in lines)
    with pytest.raises(ValueError, match="'slow' has 1 values for 2 xs"):
        curve({"fast": [1, 2, 3], "slow": [2, 3]}, lines, tmp_path / "own.svg")


def test_a_place_is_marked(tmp_path):
    curve([1, 3], {"a": [1.0, 3.0]}, tmp_path / "plain.svg")
    curve([1, 3], {"a": [1.0, 3.0]}, tmp_path / "marked.svg", marks={"here": 2.0})
    plain, marked = ((tmp_path / f"{name}.svg").read_text() for name in ("plain", "marked"))
    assert "<!-- here -->" in marked and marked.count("stroke-dasharray") == plain.count("stroke-dasharray") + 1


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion_lm\[viz\]'"):
        curve([1], {"train": [1.0]}, tmp_path / "a.png")


def test_no_two_of_many_curves_look_alike(tmp_path):
    curve([0, 1], {f"line {i}": [i, i + 1] for i in range(14)}, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    drawn = re.findall(r'clip-path="[^"]*" style="(fill: none; [^"]*stroke-width: 1.6[^"]*)"', picture)
    assert len(drawn) == len(set(drawn)) == 14


@pytest.mark.parametrize(
    ("value", "unit", "label"),
    [
        (0.01, "s", "10 ms"),
        (0.1, "s", "100 ms"),
        (1.0, "s", "1 s"),
        (2e-6, "s", "2 µs"),
        (0.0, "s", "0 s"),
        (64, "", "64"),
        (0.001, "", "0.001"),
        (0.00002, "", "0.00002"),
        (18_000, "", "18k"),
        (30_000_000, "", "30M"),
    ],
)
def test_ticks_are_real_numbers(value, unit, label):
    assert tick_label(value, unit) == label


def test_logarithmic_axes_carry_numbers_and_units(tmp_path):
    xs, seconds = [1, 4, 16, 64], [0.004, 0.02, 0.09, 0.6]
    options = {"log_x": True, "log_y": True, "x_label": "tokens", "y_label": "time", "y_unit": "s"}
    curve(xs, {"ar": seconds}, tmp_path / "a.svg", **options)
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "a.svg").read_text())
    assert {"1", "4", "16", "64", "10 ms", "100 ms", "500 ms"} <= set(texts)
    assert not [text for text in texts if "$" in text or "^" in text or re.search(r"\de[-+]?\d", text)]


def test_a_long_linear_axis_has_no_exponent_either(tmp_path):
    curve([0, 3_000_000], {"loss": [1e-4, 3e-4]}, tmp_path / "a.svg")
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "a.svg").read_text())
    assert "0.0001" in texts and not [text for text in texts if re.search(r"\de[-+]?\d", text)]
