"""The scoreboard's page of curves: solved by passes, by training examples seen, and by how hard a test is."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusion_lm.planning.results import TOKENS
from diffusion_lm.visualize.panels import Chart, Line, panels
from launch.planning.results_table import Cell, Row


def write(cells: Sequence[Cell], path: Path) -> None:
    """One page: a chart a task (or, where there are several decodings, a task's kind of network) by passes, and one a
    task by examples seen and by difficulty, where there is more than one of them."""
    panels({**_passes(cells), **_examples(cells), **_difficulty(cells)}, path, y_label="solved")


def _passes(cells: Sequence[Cell]) -> dict[str, Chart]:
    rows = [row for cell in cells for row in cell.rows]
    several = len({row.decoding for row in rows if row.passes}) > 1
    points, levels = [], {}
    for row in rows:
        title = f"{row.task}, {_kind(row, cells)}" if several else row.task
        if row.passes:
            points.append((title, row.decoding if several else _kind(row, cells), row.passes, row.solved))
        else:
            name = "token by token" if several else f"{_kind(row, cells)}, token by token"
            levels.setdefault(title, {})[name] = row.solved[0]
    lines = _lines(points)
    titles = dict.fromkeys([*lines, *levels])
    return {title: Chart(lines.get(title, {}), "passes", levels=levels.get(title, {})) for title in titles}


def _examples(cells: Sequence[Cell]) -> dict[str, Chart]:
    points = [
        (f"{row.task}, as it learns", f"{_kind(row, cells)}, {_how(row)}", row.examples, row.solved)
        for cell in cells
        for row in cell.learning
    ]
    return {title: Chart(lines, "examples seen") for title, lines in _lines(points).items() if _spread(lines)}


def _difficulty(cells: Sequence[Cell]) -> dict[str, Chart]:
    points = [
        (f"{row.task}, by difficulty", f"{_kind(row, cells)}, {_how(row)}", measure, row.solved)
        for cell in cells
        for measure, row in cell.difficulty
    ]
    labels = {f"{cell.rows[0].task}, by difficulty": cell.measured for cell in cells}
    return {
        title: Chart(lines, labels[title], doubling=False) for title, lines in _lines(points).items() if _spread(lines)
    }


def _kind(row: Row, cells: Sequence[Cell]) -> str:
    seeds = {cell.rows[0].seed for cell in cells}
    return row.kind if len(seeds) == 1 else f"{row.kind}, seed {row.seed}"


def _how(row: Row) -> str:
    if row.decoding == TOKENS.decoding:
        return "token by token"
    return f"{row.decoding}, {row.passes} pass{'es' if row.passes > 1 else ''}"


def _lines(points: Iterable[tuple[str, str, int, tuple[float, float, float]]]) -> dict[str, dict[str, Line]]:
    """chart -> line -> what is drawn, of (chart, line, x, (share, low, high)), x ascending."""
    found = {}
    for chart, line, x, solved in points:
        found.setdefault(chart, {}).setdefault(line, []).append((x, *solved))
    return {
        chart: {name: Line(*zip(*sorted(drawn), strict=True)) for name, drawn in lines.items()}
        for chart, lines in found.items()
    }


def _spread(lines: dict[str, Line]) -> bool:
    return any(len(line.xs) > 1 for line in lines.values())
