"""The scoreboard's table and page, read off the cells' files."""

import json
from pathlib import Path
from typing import NamedTuple

from diffusion_lm.evaluation.accuracy import by_passes, read_predictions
from diffusion_lm.tasks.base import Task
from diffusion_lm.visualize.panels import Line, panels

HEAD = (
    "| task | kind | seed | passes | NFE | solved, % | exact, % | of | steps | examples seen | parameters | minutes |"
)


class Row(NamedTuple):
    """One line of the table. solved and exact are (share, low, high), the ends of 95 % intervals; passes 0 is token by
    token; minutes are of training."""

    task: str
    kind: str
    seed: int
    passes: int
    nfe: int
    solved: tuple[float, float, float]
    exact: tuple[float, float, float]
    tests: int
    steps: int
    examples: int
    parameters: int
    minutes: float
    hardware: str
    date: str


def rows(folder: Path, task: Task, name: str, kind: str) -> list[Row]:
    """A cell's rows, counted from its predictions."""
    cell = json.loads((folder / "cell.json").read_text())
    predictions = read_predictions(folder / "predictions.jsonl")
    nfe = {p.passes: p.nfe for p in predictions}
    return [
        Row(
            task=name,
            kind=kind,
            seed=cell["seed"],
            passes=passes,
            nfe=nfe[passes],
            solved=(found.verified.value, found.verified.low, found.verified.high),
            exact=(found.exact.value, found.exact.low, found.exact.high),
            tests=found.verified.total,
            steps=cell["steps"],
            examples=cell["examples"],
            parameters=cell["parameters"],
            minutes=cell["train_seconds"] / 60,
            hardware=cell["hardware"],
            date=cell["date"],
        )
        for passes, found in by_passes(task, predictions).items()
    ]


def write(found: list[Row], folder: Path) -> None:
    """scoreboard.md and scoreboard.svg in a folder."""
    lines = [HEAD, "|---|---|" + "---:|" * 10, *map(_line, found)]
    where = sorted({f"{row.hardware}, {row.date}" for row in found})
    (folder / "scoreboard.md").write_text("\n".join([*lines, "", *where]) + "\n", encoding="utf-8")
    charts, levels = {row.task: {} for row in found}, {}
    for (task, name), mine in _grouped(found).items():
        if canvases := [row for row in mine if row.passes]:
            solved = zip(*(row.solved for row in canvases), strict=True)
            charts[task][name] = Line([row.passes for row in canvases], *solved)
        for row in mine:
            if not row.passes:
                levels.setdefault(task, {})[f"{name}, token by token"] = row.solved[0]
    panels(charts, folder / "scoreboard.svg", x_label="passes", y_label="solved", levels=levels)


def _grouped(found: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Each cell's rows, by its task and its name there."""
    seeds, groups = len({row.seed for row in found}), {}
    for row in found:
        name = row.kind if seeds == 1 else f"{row.kind}, seed {row.seed}"
        groups.setdefault((row.task, name), []).append(row)
    return groups


def _line(row: Row) -> str:
    def share(of):
        return f"{100 * of[0]:.1f} ({100 * of[1]:.1f}–{100 * of[2]:.1f})"

    passes = "token by token" if row.passes == 0 else str(row.passes)
    cells = [row.task, row.kind, row.seed, passes, row.nfe, share(row.solved), share(row.exact), row.tests]
    cells += [f"{row.steps:,}", f"{row.examples:,}", f"{row.parameters / 1e6:.2f}M", f"{row.minutes:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"
