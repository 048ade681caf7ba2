"""The scoreboard's plots: share of tests solved by denoising steps, by training examples and by difficulty."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusion_lm.planning.results import AUTOREGRESSIVE
from diffusion_lm.visualize.plots import Line, Panel, panels
from launch.planning.results_table import ResultRow, RunResults


def write(results: Sequence[RunResults], path: Path) -> None:
    """Writes one page.

    Each task has a panel by denoising steps (one for each of its kinds, if there are several decodings), and one by
    training examples and by difficulty where these vary.
    """
    charts = {**_by_steps(results), **_by_examples(results), **_by_difficulty(results)}
    panels(charts, path, y_label="solved")


def _by_steps(results: Sequence[RunResults]) -> dict[str, Panel]:
    rows = [row for result in results for row in result.rows]
    several = len({row.decoding for row in rows if row.denoising_steps}) > 1
    points, levels = [], {}
    for row in rows:
        kind = _kind(row, results)
        title = f"{row.task}, {kind}" if several else row.task
        if row.denoising_steps:
            points.append((title, row.decoding if several else kind, row.denoising_steps, row.solved))
        else:
            name = row.decoding if several else f"{kind}, {row.decoding}"
            levels.setdefault(title, {})[name] = row.solved[0]
    lines = _lines(points)
    titles = dict.fromkeys([*lines, *levels])
    return {title: Panel(lines.get(title, {}), "denoising steps", levels=levels.get(title, {})) for title in titles}


def _by_examples(results: Sequence[RunResults]) -> dict[str, Panel]:
    points = [
        (f"{row.task}, during training", f"{_kind(row, results)}, {_setting(row)}", row.examples, row.solved)
        for result in results
        for row in result.learning
    ]
    return {title: Panel(lines, "training examples") for title, lines in _lines(points).items() if _varies(lines)}


def _by_difficulty(results: Sequence[RunResults]) -> dict[str, Panel]:
    points = [
        (f"{row.task}, by difficulty", f"{_kind(row, results)}, {_setting(row)}", difficulty, row.solved)
        for result in results
        for difficulty, row in result.difficulty
    ]
    labels = {f"{result.rows[0].task}, by difficulty": result.difficulty_unit for result in results}
    return {
        title: Panel(lines, labels[title], log_x=False) for title, lines in _lines(points).items() if _varies(lines)
    }


def _kind(row: ResultRow, results: Sequence[RunResults]) -> str:
    seeds = {result.rows[0].seed for result in results}
    return row.kind if len(seeds) == 1 else f"{row.kind}, seed {row.seed}"


def _setting(row: ResultRow) -> str:
    if row.decoding == AUTOREGRESSIVE.decoding:
        return row.decoding
    return f"{row.decoding}, {row.denoising_steps} step{'s' if row.denoising_steps > 1 else ''}"


def _lines(points: Iterable[tuple[str, str, int, tuple[float, float, float]]]) -> dict[str, dict[str, Line]]:
    """Points (panel, line, x, (share, low, high)) -> panel -> line -> what is drawn, x ascending."""
    found = {}
    for panel, line, x, solved in points:
        found.setdefault(panel, {}).setdefault(line, []).append((x, *solved))
    return {
        panel: {name: Line(*zip(*sorted(drawn), strict=True)) for name, drawn in lines.items()}
        for panel, lines in found.items()
    }


def _varies(lines: dict[str, Line]) -> bool:
    return any(len(line.xs) > 1 for line in lines.values())
