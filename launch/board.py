"""The scoreboard's table, page and pictures, read off the cells' files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_lm.evaluation.accuracy import TOKENS, Way, by_way, read_predictions
from diffusion_lm.tasks.base import Example, Task
from diffusion_lm.tasks.sudoku import BOXES, Sudoku
from diffusion_lm.visualize.filling import Filling, filling_picture
from diffusion_lm.visualize.page import write_whole
from diffusion_lm.visualize.panels import Line, panels

COLUMNS = (
    "task", "kind", "seed", "decoding", "passes", "NFE", "solved, %", "exact, %", "of", "taken back", "mended",
    "spoiled", "steps", "examples seen", "parameters", "minutes",
)  # fmt: skip
FRAMES = "frames.json"  # in a cell's folder: one test's answers, pass by pass


class Row(NamedTuple):
    """One line of the table. solved and exact are (share, low, high), the ends of 95 % intervals; passes 0 is token by
    token; takebacks None where nothing can be taken back; minutes are of training."""

    task: str
    kind: str
    seed: int
    decoding: str
    passes: int
    nfe: int
    solved: tuple[float, float, float]
    exact: tuple[float, float, float]
    tests: int
    takebacks: dict[str, int] | None
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
    nfe = {one.way: one.nfe for one in predictions}
    takebacks = cell.get("takebacks", {})
    return [
        Row(
            task=name,
            kind=kind,
            seed=cell["seed"],
            decoding=way.decoding,
            passes=way.passes,
            nfe=nfe[way],
            solved=(found.verified.value, found.verified.low, found.verified.high),
            exact=(found.exact.value, found.exact.low, found.exact.high),
            tests=found.verified.total,
            takebacks=takebacks.get(way.decoding, {}).get(str(way.passes)),
            steps=cell["steps"],
            examples=cell["examples"],
            parameters=cell["parameters"],
            minutes=cell["train_seconds"] / 60,
            hardware=cell["hardware"],
            date=cell["date"],
        )
        for way, found in by_way(task, predictions).items()
    ]


def write(found: list[Row], folder: Path) -> None:
    """scoreboard.md and scoreboard.svg in a folder: a chart a task, or, where there are several decodings, a task's
    kind of network."""
    head = [f"| {' | '.join(COLUMNS)} |", "|---|---|---:|---|" + "---:|" * (len(COLUMNS) - 4)]
    where = sorted({f"{row.hardware}, {row.date}" for row in found})
    lines = [*head, *map(_line, found), "", *where]
    (folder / "scoreboard.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    charts, levels = {}, {}
    for (title, name), mine in _grouped(found).items():
        chart = charts.setdefault(title, {})
        if mine[0].passes:
            solved = zip(*(row.solved for row in mine), strict=True)
            chart[name] = Line([row.passes for row in mine], *solved)
        else:
            levels.setdefault(title, {})[name] = mine[0].solved[0]
    panels(charts, folder / "scoreboard.svg", x_label="passes", y_label="solved", levels=levels)


def _grouped(found: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each line, by its chart's title and its name there."""
    seeds, several, groups = len({row.seed for row in found}), len({r.decoding for r in found if r.passes}) > 1, {}
    for row in found:
        kind = row.kind if seeds == 1 else f"{row.kind}, seed {row.seed}"
        how = row.decoding if row.passes else "token by token"
        alone = kind if row.passes else f"{kind}, {how}"
        key = (f"{row.task}, {kind}", how) if several else (row.task, alone)
        groups.setdefault(key, []).append(row)
    return groups


def _line(row: Row) -> str:
    def share(of):
        return f"{100 * of[0]:.1f} ({100 * of[1]:.1f}–{100 * of[2]:.1f})"

    way = ["token by token", ""] if row.decoding == TOKENS.decoding else [row.decoding, row.passes]
    cells = [row.task, row.kind, row.seed, *way, row.nfe, share(row.solved), share(row.exact), row.tests]
    cells += [row.takebacks[name] if row.takebacks else "" for name in ("times", "mended", "spoiled")]
    cells += [f"{row.steps:,}", f"{row.examples:,}", f"{row.parameters / 1e6:.2f}M", f"{row.minutes:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


# ---- a picture of one answer ----


def shown(tests: Sequence[Example], chosen: int | None = None) -> int | None:
    """The number of the test whose answers are shown: the chosen one, or the first with the most blanks. None where
    prompt and answer are not one grid. ValueError where there aren't so many tests."""
    if chosen is not None and chosen >= len(tests):
        raise ValueError(f"--show={chosen}: the tests' numbers are 0 to {len(tests) - 1}")
    if any(len(test.prompt) != len(test.answer) for test in tests):
        return None
    return max(range(len(tests)), key=lambda i: tests[i].prompt.count("0")) if chosen is None else chosen


def keep_frames(folder: Path, way: Way, test: Example, frames: list[list[str]]) -> None:
    """Adds a decoding's frames to the cell's, in place of those in fewer passes."""
    path = folder / FRAMES
    kept = json.loads(path.read_text()) if path.exists() else {**test._asdict(), "decodings": {}}
    if kept["decodings"].get(way.decoding, {"passes": 0})["passes"] <= way.passes:
        kept["decodings"][way.decoding] = {"passes": way.passes, "frames": frames}
        write_whole(path, json.dumps(kept).encode())


def picture(folder: Path, task: Task, out: Path) -> None:
    """CELL.svg in a folder, from the cell's frames: in which order each decoding filled the grid."""
    path = folder / FRAMES
    if not path.exists():
        return
    kept = json.loads(path.read_text())
    prompt, answer = kept["prompt"], kept["answer"]
    box = BOXES[task.size] if isinstance(task, Sudoku) else None
    fillings = []
    for decoding, said in kept["decodings"].items():
        frames = [frame[: len(answer)] for frame in said["frames"]]
        text = "".join(frames[-1])
        right = text if task.verify(prompt, text) else answer
        given = [p != "0" for p in prompt]
        solved = "solved" if right == text else "not solved"
        title = f"{decoding}, {said['passes']} passes: {solved}"
        fillings.append(Filling(title=title, given=given, right=list(right), frames=frames))
    filling_picture(fillings, out / f"{folder.name}.svg", columns=task.size if box else len(answer), box=box)
