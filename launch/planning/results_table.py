"""The scoreboard's table and pictures, made from the runs' files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_lm.planning.pictures import GridHistory, decoding_order_picture
from diffusion_lm.planning.results import (
    AUTOREGRESSIVE,
    Prediction,
    Setting,
    by_difficulty,
    by_setting,
    read_predictions,
)
from diffusion_lm.planning.tasks.base import Example, Task
from diffusion_lm.planning.tasks.sudoku import BOXES, Sudoku
from diffusion_lm.visualize.page import write_whole

COLUMNS = (
    "task", "kind", "seed", "decoding", "denoising steps", "forward passes", "solved, %", "exact, %", "tests",
    "changes", "wrong first", "of these changed", "corrected", "broken",
    "updates", "training examples", "parameters", "minutes",
)  # fmt: skip
SUMMARY = "summary.json"  # in a run's folder
PREDICTIONS = "predictions.jsonl"  # of the last checkpoint; predictions-STEP.jsonl: of an earlier one
FRAMES = "frames.json"  # one test's answers after each denoising step


class ResultRow(NamedTuple):
    """One line of the table.

    denoising_steps  requested for an answer; 0: autoregressive decoding
    nfe              forward passes of an answer
    solved, exact    (share, low, high): with the ends of the 95 % interval
    remasking        None for decodings that never change a committed token
    minutes          of training
    """

    task: str
    kind: str
    seed: int
    decoding: str
    denoising_steps: int
    nfe: int
    solved: tuple[float, float, float]
    exact: tuple[float, float, float]
    tests: int
    remasking: dict[str, int] | None
    steps: int
    examples: int
    parameters: int
    minutes: float
    hardware: str
    date: str


class RunResults(NamedTuple):
    """The results of one trained model, from its folder.

    rows             of the table
    learning         rows of all checkpoints in the representative settings, oldest first; none if there is only one
    difficulty       (difficulty, row) of the tests of each difficulty, in the same settings
    difficulty_unit  what difficulty counts
    """

    rows: list[ResultRow]
    learning: list[ResultRow]
    difficulty: list[tuple[int, ResultRow]]
    difficulty_unit: str


def read(folder: Path, task: Task, name: str, kind: str) -> RunResults:
    """The results of a run, counted from its predictions."""
    summary = json.loads((folder / SUMMARY).read_text())
    predictions = read_predictions(folder / PREDICTIONS)
    rows, remasking = _rows(task, name, kind, summary, predictions), summary.get("remasking", {})
    shown = representative(task, [Setting(row.decoding, row.denoising_steps) for row in rows])
    learning = []
    for step, path in earlier_predictions(folder).items():
        then = {**summary, "steps": step, "examples": summary["examples"] * step // summary["steps"]}
        learning += _rows(task, name, kind, then, read_predictions(path))
    some = [one for one in predictions if one.setting in shown]
    final, groups = _rows(task, name, kind, summary, some), by_difficulty(task, some)
    return RunResults(
        rows=[row._replace(remasking=remasking.get(row.decoding, {}).get(str(row.denoising_steps))) for row in rows],
        learning=[*learning, *final] if learning else [],
        difficulty=[(hard, row) for hard, of in groups.items() for row in _rows(task, name, kind, summary, of)],
        difficulty_unit=task.difficulty_unit,
    )


def representative(task: Task, settings: Sequence[Setting]) -> list[Setting]:
    """The settings to show where few fit: autoregressive, and the first decoding with the most useful steps.

    Steps beyond an answer's positions are useless: a step commits at least one.
    """
    denoising = [setting for setting in settings if setting.denoising_steps]
    first = [setting for setting in denoising if setting.decoding == denoising[0].decoding]
    useful = [setting for setting in first if setting.denoising_steps <= task.max_lengths[1] + 1] or first[:1]
    most = [max(useful, key=lambda setting: setting.denoising_steps)] if useful else []
    return [setting for setting in settings if setting == AUTOREGRESSIVE] + most


def earlier_predictions(folder: Path) -> dict[int, Path]:
    """Step -> predictions file, of a run's checkpoints before the last."""
    stem, _, ending = PREDICTIONS.partition(".")
    found = {int(path.stem.rpartition("-")[2]): path for path in folder.glob(f"{stem}-*.{ending}")}
    return dict(sorted(found.items()))


def predictions_of_step(folder: Path, step: int) -> Path:
    """The predictions file of a checkpoint before the last."""
    return folder / PREDICTIONS.replace(".", f"-{step}.")


def _rows(task: Task, name: str, kind: str, summary: dict, predictions: Sequence[Prediction]) -> list[ResultRow]:
    nfe = {one.setting: one.nfe for one in predictions}
    return [
        ResultRow(
            task=name,
            kind=kind,
            seed=summary["seed"],
            decoding=setting.decoding,
            denoising_steps=setting.denoising_steps,
            nfe=nfe[setting],
            solved=(found.verified.value, found.verified.low, found.verified.high),
            exact=(found.exact.value, found.exact.low, found.exact.high),
            tests=found.verified.total,
            remasking=None,
            steps=summary["steps"],
            examples=summary["examples"],
            parameters=summary["parameters"],
            minutes=summary["train_seconds"] / 60,
            hardware=summary["hardware"],
            date=summary["date"],
        )
        for setting, found in by_setting(task, predictions).items()
    ]


def write(results: Sequence[RunResults], folder: Path) -> None:
    """Writes scoreboard.md into a folder."""
    rows = [row for result in results for row in result.rows]
    head = [f"| {' | '.join(COLUMNS)} |", "|---|---|---:|---|" + "---:|" * (len(COLUMNS) - 4)]
    where = sorted({f"{row.hardware}, {row.date}" for row in rows})
    lines = [*head, *map(_line, rows), "", *where]
    write_whole(folder / "scoreboard.md", ("\n".join(lines) + "\n").encode())


def _line(row: ResultRow) -> str:
    def percent(of):
        return f"{100 * of[0]:.1f} ({100 * of[1]:.1f}–{100 * of[2]:.1f})"

    cells = [row.task, row.kind, row.seed, row.decoding, row.denoising_steps or "", row.nfe]
    cells += [percent(row.solved), percent(row.exact), row.tests]
    counts = ("changes", "first_wrong", "wrong_remasked", "corrected", "broken")
    cells += [row.remasking[name] if row.remasking else "" for name in counts]
    cells += [f"{row.steps:,}", f"{row.examples:,}", f"{row.parameters / 1e6:.2f}M", f"{row.minutes:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


# ---- a picture of one answer ----


def shown_test(tests: Sequence[Example], chosen: int | None = None) -> int | None:
    """The index of the test whose answers are drawn: the chosen one, or the first with the most blanks.

    None where prompt and answer aren't one grid. ValueError if there aren't so many tests.
    """
    if chosen is not None and chosen >= len(tests):
        raise ValueError(f"--show must be the index of a test, 0 to {len(tests) - 1}; got {chosen}")
    if any(len(test.prompt) != len(test.answer) for test in tests):
        return None
    return max(range(len(tests)), key=lambda i: tests[i].prompt.count("0")) if chosen is None else chosen


def keep_frames(folder: Path, setting: Setting, test: Example, frames: list[list[str]]) -> None:
    """Adds a decoding's frames to a run's, replacing those with fewer denoising steps."""
    path = folder / FRAMES
    kept = json.loads(path.read_text()) if path.exists() else {**test._asdict(), "decodings": {}}
    before = kept["decodings"].get(setting.decoding, {"denoising_steps": 0})
    if before["denoising_steps"] <= setting.denoising_steps:
        kept["decodings"][setting.decoding] = {"denoising_steps": setting.denoising_steps, "frames": frames}
        write_whole(path, json.dumps(kept).encode())


def picture(folder: Path, task: Task, out: Path) -> None:
    """Writes the order in which each decoding filled the grid, from a run's frames, as out/RUN.svg."""
    path = folder / FRAMES
    if not path.exists():
        return
    kept = json.loads(path.read_text())
    prompt, answer = kept["prompt"], kept["answer"]
    box = BOXES[task.size] if isinstance(task, Sudoku) else None
    grids = []
    for decoding, found in kept["decodings"].items():
        frames = [frame[: len(answer)] for frame in found["frames"]]
        text = "".join(frames[-1])
        right = text if task.verify(prompt, text) else answer
        solved = "solved" if right == text else "not solved"
        title = f"{decoding}, {found['denoising_steps']} steps: {solved}"
        grids.append(GridHistory(title=title, given=[p != "0" for p in prompt], right=list(right), frames=frames))
    decoding_order_picture(grids, out / f"{folder.name}.svg", columns=task.size if box else len(answer), box=box)
