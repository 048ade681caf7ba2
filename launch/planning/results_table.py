"""The scoreboard's table and pictures, read off the cells' files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_lm.planning.pictures import Filling, filling_picture
from diffusion_lm.planning.results import TOKENS, Prediction, Way, by_difficulty, by_way, read_predictions
from diffusion_lm.planning.tasks.base import Example, Task
from diffusion_lm.planning.tasks.sudoku import BOXES, Sudoku
from diffusion_lm.visualize.page import write_whole

COLUMNS = (
    "task", "kind", "seed", "decoding", "passes", "NFE", "solved, %", "exact, %", "of", "taken back", "wrong",
    "doubted", "mended", "spoiled", "steps", "examples seen", "parameters", "minutes",
)  # fmt: skip
PREDICTIONS = "predictions.jsonl"  # in a cell's folder, of the last checkpoint; predictions-STEP.jsonl: of another
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


class Cell(NamedTuple):
    """What a cell's files say.

    rows        the table's
    learning    of the checkpoints along the way and of the last one, in the ways that stand for it, oldest first
    difficulty  (how hard, its row) of the tests of each difficulty, in the same ways
    measured    what difficulty counts
    """

    rows: list[Row]
    learning: list[Row]
    difficulty: list[tuple[int, Row]]
    measured: str


def read(folder: Path, task: Task, name: str, kind: str) -> Cell:
    """A cell, counted from its predictions."""
    cell = json.loads((folder / "cell.json").read_text())
    predictions = read_predictions(folder / PREDICTIONS)
    rows, takebacks = _rows(task, name, kind, cell, predictions), cell.get("takebacks", {})
    ways = standing(task, [Way(row.decoding, row.passes) for row in rows])
    learning = []
    for step, path in earlier(folder).items():
        then = {**cell, "steps": step, "examples": cell["examples"] * step // cell["steps"]}
        learning += _rows(task, name, kind, then, read_predictions(path))
    final = _rows(task, name, kind, cell, [one for one in predictions if one.way in ways])
    groups = by_difficulty(task, [one for one in predictions if one.way in ways])
    return Cell(
        rows=[row._replace(takebacks=takebacks.get(row.decoding, {}).get(str(row.passes))) for row in rows],
        learning=[*learning, *final] if learning else [],
        difficulty=[(hard, row) for hard, some in groups.items() for row in _rows(task, name, kind, cell, some)],
        measured=task.difficulty_unit,
    )


def standing(task: Task, ways: Sequence[Way]) -> list[Way]:
    """The ways that stand for a network where few can be shown: token by token, and of the first decoding the most
    passes for which an answer has positions."""
    passes = [way for way in ways if way.passes]
    first = [way for way in passes if way.decoding == passes[0].decoding]
    useful = [way for way in first if way.passes <= task.max_lengths[1] + 1] or first[:1]
    most = [max(useful, key=lambda way: way.passes)] if useful else []
    return [way for way in ways if way == TOKENS] + most


def earlier(folder: Path) -> dict[int, Path]:
    """Step -> the predictions of a cell's checkpoint before the last."""
    stem, _, ending = PREDICTIONS.partition(".")
    found = {int(path.stem.rpartition("-")[2]): path for path in folder.glob(f"{stem}-*.{ending}")}
    return dict(sorted(found.items()))


def of_step(folder: Path, step: int) -> Path:
    """Where the predictions of a checkpoint before the last are."""
    return folder / PREDICTIONS.replace(".", f"-{step}.")


def _rows(task: Task, name: str, kind: str, cell: dict, predictions: Sequence[Prediction]) -> list[Row]:
    nfe = {one.way: one.nfe for one in predictions}
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
            takebacks=None,
            steps=cell["steps"],
            examples=cell["examples"],
            parameters=cell["parameters"],
            minutes=cell["train_seconds"] / 60,
            hardware=cell["hardware"],
            date=cell["date"],
        )
        for way, found in by_way(task, predictions).items()
    ]


def write(cells: Sequence[Cell], folder: Path) -> None:
    """scoreboard.md in a folder."""
    found = [row for cell in cells for row in cell.rows]
    head = [f"| {' | '.join(COLUMNS)} |", "|---|---|---:|---|" + "---:|" * (len(COLUMNS) - 4)]
    where = sorted({f"{row.hardware}, {row.date}" for row in found})
    lines = [*head, *map(_line, found), "", *where]
    (folder / "scoreboard.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(row: Row) -> str:
    def share(of):
        return f"{100 * of[0]:.1f} ({100 * of[1]:.1f}–{100 * of[2]:.1f})"

    way = ["token by token", ""] if row.decoding == TOKENS.decoding else [row.decoding, row.passes]
    cells = [row.task, row.kind, row.seed, *way, row.nfe, share(row.solved), share(row.exact), row.tests]
    thoughts = ("times", "wrong", "doubted", "mended", "spoiled")  # of cells from before, some are unknown
    cells += [(row.takebacks or {}).get(name, "") for name in thoughts]
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
