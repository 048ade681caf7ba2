"""A page of charts: what is on it can be read in the SVG."""

import pytest

from diffusion_lm.visualize.panels import Line, panels

pytest.importorskip("matplotlib")
LINE = Line([1, 2, 4], [0.1, 0.5, 0.9], [0.05, 0.4, 0.8], [0.2, 0.6, 0.95])


def test_a_chart_a_title(tmp_path):
    path = tmp_path / "page.svg"
    charts = {title: {"masked": LINE} for title in ("sudoku", "path", "queens", "sat")}
    panels(charts, path, x_label="passes", y_label="solved", levels={"path": {"ar": 0.7}})
    page = path.read_text()
    assert page.count('id="axes_') == 4
    assert page.count("<!-- masked -->") == 4 and page.count("<!-- ar -->") == 1
    for title in charts:
        assert f"<!-- {title} -->" in page


def test_a_chart_may_have_levels_only(tmp_path):
    panels({"path": {}}, tmp_path / "page.svg", x_label="passes", y_label="solved", levels={"path": {"ar": 0.7}})
    assert "<!-- ar -->" in (tmp_path / "page.svg").read_text()


def test_an_ending_that_is_none_and_a_page_without_charts(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        panels({"a": {"b": LINE}}, tmp_path / "page.xyz", x_label="x", y_label="y")
    with pytest.raises(ValueError, match="no chart"):
        panels({}, tmp_path / "page.svg", x_label="x", y_label="y")
    assert not list(tmp_path.iterdir())
