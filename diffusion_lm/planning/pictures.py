"""In which order a grid was filled: one picture, each cell with the pass that wrote it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from diffusion_lm.visualize.page import write_whole

CELL, GAP, HEAD, FOOT, PAD = 54, 26, 34, 40, 10  # pixels
ACROSS = 3  # grids side by side
DASH = "·"  # in place of a piece that is no text
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
class Filling:
    """One grid being filled.

    title   said above it
    given   a bool a cell: whether the prompt shows it
    right   what should stand in each cell
    frames  what stood in each cell after each pass; "" where nothing did

    Raises ValueError without frames, or where one has another number of cells.
    """

    title: str
    given: Sequence[bool]
    right: Sequence[str]
    frames: Sequence[Sequence[str]]

    def __post_init__(self):
        if not self.frames or {len(self.right), len(self.given), *map(len, self.frames)} != {len(self.right)}:
            raise ValueError(f"{self.title}: a filling needs a frame, and {len(self.right)} cells in every one")


class Cell(NamedTuple):
    """What became of a cell: its last text, the pass (from 1) that wrote it (0: none did), and what stood there before,
    oldest first."""

    text: str
    written: int
    before: tuple[str, ...]


def cells(frames: Sequence[Sequence[str]]) -> list[Cell]:
    """The story of each cell. Text that was taken back and written once more counts as written then."""
    found = []
    for stood in zip(*frames, strict=True):
        writes = [
            (p, now) for p, (was, now) in enumerate(zip(("", *stood), stood, strict=False), 1) if now not in ("", was)
        ]
        gone = not stood[-1]
        past = writes if gone else writes[:-1]
        found.append(Cell(stood[-1], 0 if gone else writes[-1][0], tuple(text for _, text in past)))
    return found


def filling_picture(
    fillings: Sequence[Filling], path: str | os.PathLike, *, columns: int, box: tuple[int, int] | None = None
) -> None:
    """Write an SVG of grids with `columns` cells a row, lines around boxes of (rows, columns) if given.

    The later a cell was written, the darker; its pass stands in the corner, other text that stood there before is
    struck out beside it, and wrong text is framed. It follows the reader's light or dark setting. Raises ValueError
    where there is no grid, the cells make no rows, or path doesn't end in .svg; OSError where path cannot be written.
    """
    if Path(path).suffix != ".svg":
        raise ValueError(f"the picture is an SVG: name a file that ends in .svg, not {Path(path).name}")
    if not fillings or columns < 1 or any(len(filling.right) % columns for filling in fillings):
        raise ValueError(f"{len(fillings)} grids of {columns} columns: give one at least, its cells in whole rows")
    write_whole(path, _picture(fillings, columns, box).encode())


def _picture(fillings, columns, box):
    across = min(ACROSS if columns <= 9 else 1, len(fillings))
    wide = max(columns * CELL, 210)
    high = max(len(filling.right) for filling in fillings) // columns * CELL + HEAD
    down = -(-len(fillings) // across)
    width = max(2 * PAD + across * (wide + GAP) - GAP, 520)
    height = 2 * PAD + down * (high + GAP) - GAP + FOOT
    grids = [
        f'<g transform="translate({PAD + k % across * (wide + GAP)} {PAD + k // across * (high + GAP)})">'
        f"{_grid(filling, columns, box)}</g>"
        for k, filling in enumerate(fillings)
    ]
    titles = escape("; ".join(filling.title for filling in fillings))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>The order in which cells were filled</title><desc>{titles}</desc>'
        f'<style>{_style()}</style><rect class="f-panel" width="{width}" height="{height}"/>'
        f"{''.join(grids)}{_legend(height - 16)}</svg>\n"
    )


def _style():
    def colours(side):
        return "".join(f".f-{name}{{fill:{c[side]}}}.s-{name}{{stroke:{c[side]}}}" for name, c in COLOURS.items())

    return (
        "text{font:12px system-ui,sans-serif}.h{font-weight:600;font-size:13px}.d{font-size:24px;text-anchor:middle}"
        ".p{font-size:11px}.g{font-weight:700}.x{font-size:12px;text-anchor:end;text-decoration:line-through}"
        f".n{{fill:none}}{colours(0)}@media(prefers-color-scheme:dark){{{colours(1)}}}"
    )


def _grid(filling, columns, box):
    rows, last = len(filling.right) // columns, len(filling.frames)
    parts = [f'<text class="h f-ink" y="16">{escape(filling.title)}</text><g transform="translate(0 {HEAD - 8})">']
    for i, (cell, right, given) in enumerate(zip(cells(filling.frames), filling.right, filling.given, strict=True)):
        parts.append(_cell(cell, right, given, i % columns * CELL, i // columns * CELL, last))
    high, wide = box or (rows, columns)
    lines = [f"M0 {y * CELL}h{columns * CELL}" for y in range(0, rows + 1, high)]
    lines += [f"M{x * CELL} 0v{rows * CELL}" for x in range(0, columns + 1, wide)]
    return "".join([*parts, f'<path class="n s-edge" stroke-width="2" d="{"".join(lines)}"/></g>'])


def _cell(cell, right, given, x, y, last):
    """Shade and border, text, pass, what stood there before."""
    shade = 0.08 + 0.5 * (cell.written - 1) / max(last - 1, 1) if cell.written else 0
    ink = "wrong" if cell.text != right else "given" if given else "ink"
    parts = [
        f'<rect class="f-shade" x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill-opacity="{shade:.2f}"/>',
        f'<rect class="n s-line" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>',
        f'<text class="d {"g " if given else ""}f-{ink}" x="{x + CELL / 2:g}" y="{y + 38}">{_shown(cell.text)}</text>',
    ]
    if cell.written:
        parts.append(f'<text class="p f-soft" x="{x + 4}" y="{y + 13}">{cell.written}</text>')
    if others := [text for text in dict.fromkeys(cell.before) if text != cell.text]:
        hue = "wrong" if any(text != right for text in others) else "soft"
        texts = "".join(map(_shown, others))
        parts.append(f'<text class="x f-{hue}" x="{x + CELL - 4}" y="{y + 14}">{texts}</text>')
    if cell.text != right:
        size = CELL - 6
        parts.append(
            f'<rect class="n s-wrong" stroke-width="2" x="{x + 3}" y="{y + 3}" width="{size}" height="{size}"/>'
        )
    return "".join(parts)


def _shown(text):
    return escape(text) if text.isprintable() else DASH


def _legend(y):
    said = [
        ("soft", "corner: the pass that wrote it, darker later"),
        ("given", "given"),
        ("soft", "struck out: stood there before"),
        ("wrong", "framed: wrong"),
    ]
    spans = "".join(f'<tspan dx="{16 * (k > 0)}" class="f-{ink}">{text}</tspan>' for k, (ink, text) in enumerate(said))
    return f'<text y="{y}" x="{PAD}">{spans}</text>'
