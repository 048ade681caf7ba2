"""A page of charts: what is on it can be read in the SVG."""

import pytest

from diffusion_lm.visualize.panels import Chart, Line, panels

pytest.importorskip("matplotlib")
LINE = Line([1, 2, 4], [0.1, 0.5, 0.9], [0.05, 0.4, 0.8], [0.2, 0.6, 0.95])


def test_a_chart_a_title(tmp_path):
    path = tmp_path / "page.svg"
    charts = {title: Chart({"masked": LINE}, "passes") for title in ("sudoku", "path", "queens")}
    many = LINE._replace(xs=[9000, 18_000, 36_500])
    charts["sat"] = Chart({"masked": many}, "blanks", doubling=False, levels={"ar": 0.7})
    panels(charts, path, y_label="solved")
    page = path.read_text()
    assert page.count('id="axes_') == 4
    assert page.count("<!-- masked -->") == 4 and page.count("<!-- ar -->") == 1
    for said in (*charts, "passes", "blanks", "9000", "18k", "36.5k"):
        assert f"<!-- {said} -->" in page


def test_a_chart_may_have_levels_only(tmp_path):
    panels({"path": Chart({}, "passes", levels={"ar": 0.7})}, tmp_path / "page.svg", y_label="solved")
    assert "<!-- ar -->" in (tmp_path / "page.svg").read_text()


def test_an_ending_that_is_none_and_a_page_without_charts(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        panels({"a": Chart({"b": LINE}, "x")}, tmp_path / "page.xyz", y_label="y")
    with pytest.raises(ValueError, match="no chart"):
        panels({}, tmp_path / "page.svg", y_label="y")
    assert not list(tmp_path.iterdir())
