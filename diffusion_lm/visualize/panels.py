"""A page of small charts side by side."""

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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


class Chart(NamedTuple):
    """Named lines over one axis. doubling: a step to the right is twice as much. levels: name -> y, drawn across the
    chart, for what has no x."""

    lines: Mapping[str, Line]
    x_label: str
    doubling: bool = True
    levels: Mapping[str, float] = MappingProxyType({})


def panels(charts: Mapping[str, Chart], path: str | os.PathLike, *, y_label: str) -> None:
    """Write a chart a title, as .svg, .png or .pdf; ys are shares.

    Raises ImportError without matplotlib, ValueError where there is no chart or matplotlib doesn't know the ending,
    OSError where path can't be written.
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
    for axes, (title, chart) in zip(figure.subplots(down, across, squeeze=False).flat, charts.items(), strict=False):
        axes.set(title=title, xlabel=chart.x_label, ylabel=y_label, ylim=(-0.02, 1.02))
        _draw(axes, chart)
    for axes in list(figure.axes)[len(charts) :]:
        axes.remove()
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix.removeprefix("."))
    write_whole(path, image.getvalue())


def _draw(axes, chart: Chart) -> None:
    for (name, line), style in zip(chart.lines.items(), itertools.cycle(STYLES), strict=False):
        (drawn,) = axes.plot(line.xs, line.ys, style, label=name, linewidth=1.6, marker="o", markersize=3.5)
        axes.fill_between(line.xs, line.low, line.high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    for (name, y), dashes in zip(chart.levels.items(), itertools.cycle(DASHES), strict=False):
        axes.axhline(y, label=name, linewidth=1.2, linestyle=dashes, color="0.4")
    ticks = sorted({x for line in chart.lines.values() for x in line.xs})
    if ticks and chart.doubling:
        axes.set_xscale("log", base=2)
    if ticks:
        axes.set_xticks(ticks, [_said(x) for x in ticks])
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _said(x: float) -> str:
    return f"{x / 1000:g}k" if x >= 10_000 else f"{x:g}"
