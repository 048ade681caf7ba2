"""A page of small charts side by side."""

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_lm.visualize.page import write_whole

ACROSS = 3
DASHES = ("--", ":", "-.")
STYLES = ("-", "--")  # in turn, so that a line shows under one that hides it


class Line(NamedTuple):
    """ys over xs, with the ends of their intervals."""

    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def panels(
    charts: Mapping[str, Mapping[str, Line]],
    path: str | os.PathLike,
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write a chart a title, each with its named lines, as .svg, .png or .pdf. xs are powers of 2, ys shares.

    levels: title -> name -> y, drawn across the chart, for what has no x. Raises ImportError without matplotlib,
    ValueError where there is no chart or matplotlib doesn't know the ending, OSError where path can't be written.
    """
    if not charts:
        raise ValueError("no chart to draw: give at least one")
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("panels need matplotlib: pip install 'diffusion_lm[viz]'") from error
    across = min(ACROSS, len(charts))
    down = -(-len(charts) // across)
    figure = Figure(figsize=(4.2 * across, 3.4 * down), layout="constrained", dpi=150)
    for axes, (title, lines) in zip(figure.subplots(down, across, squeeze=False).flat, charts.items(), strict=False):
        for (name, line), style in zip(lines.items(), itertools.cycle(STYLES), strict=False):
            (drawn,) = axes.plot(line.xs, line.ys, style, label=name, linewidth=1.6, marker="o", markersize=3.5)
            axes.fill_between(line.xs, line.low, line.high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        for (name, y), dashes in zip((levels or {}).get(title, {}).items(), itertools.cycle(DASHES), strict=False):
            axes.axhline(y, label=name, linewidth=1.2, linestyle=dashes, color="0.4")
        axes.set(title=title, xlabel=x_label, ylabel=y_label, ylim=(-0.02, 1.02))
        ticks = sorted({x for line in lines.values() for x in line.xs})
        if ticks:
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in list(figure.axes)[len(charts) :]:
        axes.remove()
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix.removeprefix("."))
    write_whole(path, image.getvalue())
