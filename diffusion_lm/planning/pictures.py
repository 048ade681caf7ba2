"""The order in which a grid was decoded: one picture, each cell with the denoising step that committed it, still or
animated."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from diffusion_lm.visualize.page import write_whole

CELL, GAP, HEAD, FOOT, PAD = 54, 26, 34, 40, 10  # pixels
ACROSS = 3  # grids side by side
UNPRINTABLE = "·"
COLOURS = {  # on light, on dark
    "ink": ("#23262b", "#e4e3de"),
    "soft": ("#5c626c", "#a0a6b1"),
    "panel": ("#fbfaf6", "#171a1f"),
    "line": ("#c9c5b8", "#4a515e"),
    "edge": ("#4b4f57", "#b9b6ad"),
    "shade": ("#2c9c7b", "#3fc79d"),
    "given": ("#3b5fa8", "#9db4e3"),
    "wrong": ("#c2410c", "#ff9b62"),
}


@dataclass(frozen=True, kw_only=True)
class GridHistory:
    """One grid, after each denoising step.

    title   shown above it
    given   a bool per cell: whether the prompt shows it
    right   the correct text of each cell
    frames  each cell's text after each denoising step; "" where it is masked

    Raises ValueError without frames, or where one has another number of cells.
    """

    title: str
    given: Sequence[bool]
    right: Sequence[str]
    frames: Sequence[Sequence[str]]

    def __post_init__(self):
        if not self.frames or {len(self.right), len(self.given), *map(len, self.frames)} != {len(self.right)}:
            raise ValueError(f"{self.title}: a grid needs at least one frame, and {len(self.right)} cells in each")


class CellHistory(NamedTuple):
    """What happened to a cell.

    text      its last text, "" if it ends masked
    step      the denoising step, from 1, that committed this text; 0 if it ends masked
    previous  texts that were committed there before, oldest first
    """

    text: str
    step: int
    previous: tuple[str, ...]


def cell_histories(frames: Sequence[Sequence[str]]) -> list[CellHistory]:
    """The history of each cell. Text that was masked again and committed once more counts from then."""
    found = []
    for texts in zip(*frames, strict=True):
        steps = enumerate(zip(("", *texts), texts, strict=False), 1)
        commits = [(step, now) for step, (was, now) in steps if now not in ("", was)]
        masked = not texts[-1]
        earlier = commits if masked else commits[:-1]
        found.append(CellHistory(texts[-1], 0 if masked else commits[-1][0], tuple(text for _, text in earlier)))
    return found


def decoding_order_picture(
    grids: Sequence[GridHistory],
    path: str | os.PathLike,
    *,
    columns: int,
    box: tuple[int, int] | None = None,
    seconds_per_step: float = 0.0,
) -> None:
    """Writes an SVG of grids that shows which denoising step committed each cell.

    Later cells are darker, with the step in the corner. Text that was committed there before is struck out beside it,
    and wrong text is framed. Colours follow the reader's light or dark setting.

    Args:
      grids: shown side by side.
      path: ends in .svg.
      columns: cells of a row.
      box: (rows, columns) of the boxes that lines are drawn around; None: only the grid.
      seconds_per_step: each cell appears with the step that committed it for good, over and over; 0: a still picture,
        which a reader who asked for less motion gets in any case.

    Raises:
      ValueError: without a grid, for negative seconds, if cells don't fill whole rows, or path doesn't end in .svg.
      OSError: if path cannot be written.
    """
    if Path(path).suffix != ".svg":
        raise ValueError(f"the picture is an SVG: name a file that ends in .svg, not {Path(path).name}")
    if not grids or columns < 1 or any(len(grid.right) % columns for grid in grids):
        raise ValueError(f"{len(grids)} grids of {columns} columns: give at least one, its cells in whole rows")
    if not 0 <= seconds_per_step < float("inf"):
        raise ValueError(f"seconds_per_step must be at least 0; got {seconds_per_step}")
    write_whole(path, _picture(grids, columns, box, seconds_per_step).encode())


def _picture(grids, columns, box, seconds):
    across = min(ACROSS if columns <= 9 else 1, len(grids))
    wide = max(columns * CELL, 210)
    high = max(len(grid.right) for grid in grids) // columns * CELL + HEAD
    down = -(-len(grids) // across)
    width = max(2 * PAD + across * (wide + GAP) - GAP, 620)  # the legend needs 600
    height = 2 * PAD + down * (high + GAP) - GAP + FOOT
    drawn = [
        f'<g transform="translate({PAD + k % across * (wide + GAP)} {PAD + k // across * (high + GAP)})">'
        f"{_grid(grid, columns, box)}</g>"
        for k, grid in enumerate(grids)
    ]
    titles = escape("; ".join(grid.title for grid in grids))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>The order in which cells were committed</title><desc>{titles}</desc>'
        f'<style>{_style()}{_motion(grids, seconds)}</style><rect class="f-panel" width="{width}" height="{height}"/>'
        f"{''.join(drawn)}{_legend(height - 16)}</svg>\n"
    )


def _style():
    def colours(side):
        return "".join(f".f-{name}{{fill:{c[side]}}}.s-{name}{{stroke:{c[side]}}}" for name, c in COLOURS.items())

    return (
        "text{font:12px system-ui,sans-serif}.h{font-weight:600;font-size:13px}.d{font-size:24px;text-anchor:middle}"
        ".p{font-size:11px}.g{font-weight:700}.x{font-size:12px;text-anchor:end;text-decoration:line-through}"
        f".n{{fill:none}}{colours(0)}@media(prefers-color-scheme:dark){{{colours(1)}}}"
    )


def _motion(grids, seconds):
    """Hides each cell of class s1, s2, ... until its step; the whole grids stand for the time of three steps."""
    steps = max(len(grid.frames) for grid in grids)
    if not seconds:
        return ""
    rules = []
    for step in range(1, steps + 1):
        share = 100 * step / (steps + 3)
        rules.append(
            f".s{step}{{animation:s{step} {seconds * (steps + 3):g}s step-end infinite}}"
            f"@keyframes s{step}{{0%{{opacity:0}}{share:.2f}%{{opacity:1}}}}"
        )
    return f"@media(prefers-reduced-motion:no-preference){{{''.join(rules)}}}"


def _grid(grid, columns, box):
    rows, last = len(grid.right) // columns, len(grid.frames)
    parts = [f'<text class="h f-ink" y="16">{escape(grid.title)}</text><g transform="translate(0 {HEAD - 8})">']
    for i, (cell, right, given) in enumerate(zip(cell_histories(grid.frames), grid.right, grid.given, strict=True)):
        parts.append(_cell(cell, right, given, i % columns * CELL, i // columns * CELL, last))
    high, wide = box or (rows, columns)
    lines = [f"M0 {y * CELL}h{columns * CELL}" for y in range(0, rows + 1, high)]
    lines += [f"M{x * CELL} 0v{rows * CELL}" for x in range(0, columns + 1, wide)]
    return "".join([*parts, f'<path class="n s-edge" stroke-width="2" d="{"".join(lines)}"/></g>'])


def _cell(cell, right, given, x, y, last):
    """Shade and border, text, step, previous texts."""
    shade = 0.08 + 0.5 * (cell.step - 1) / max(last - 1, 1) if cell.step else 0
    ink = "wrong" if cell.text != right else "given" if given else "ink"
    digit = (
        f'<text class="d {"g " if given else ""}f-{ink}" x="{x + CELL / 2:g}" y="{y + 38}">{_shown(cell.text)}</text>'
    )
    outside, inside = (digit, "") if ink == "given" else ("", digit)  # what the prompt shows is there from the start
    parts = [
        f'<rect class="n s-line" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/><g class="s{cell.step}">',
        f'<rect class="f-shade" x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill-opacity="{shade:.2f}"/>{inside}',
    ]
    if cell.step:
        parts.append(f'<text class="p f-soft" x="{x + 4}" y="{y + 13}">{cell.step}</text>')
    if others := [text for text in dict.fromkeys(cell.previous) if text != cell.text]:
        hue = "wrong" if any(text != right for text in others) else "soft"
        texts = "".join(map(_shown, others))
        parts.append(f'<text class="x f-{hue}" x="{x + CELL - 4}" y="{y + 14}">{texts}</text>')
    if cell.text != right:
        size = CELL - 6
        parts.append(
            f'<rect class="n s-wrong" stroke-width="2" x="{x + 3}" y="{y + 3}" width="{size}" height="{size}"/>'
        )
    return "".join([*parts, "</g>", outside])


def _shown(text):
    return escape(text) if text.isprintable() else UNPRINTABLE


def _legend(y):
    said = [
        ("soft", "corner: denoising step of the commit, darker is later"),
        ("given", "given"),
        ("soft", "struck out: committed before"),
        ("wrong", "framed: wrong"),
    ]
    spans = "".join(f'<tspan dx="{16 * (k > 0)}" class="f-{ink}">{text}</tspan>' for k, (ink, text) in enumerate(said))
    return f'<text y="{y}" x="{PAD}">{spans}</text>'
