"""Line plots by matplotlib, drawn without a display: one plot (`curve`), or a page of small ones (`panels`).

Axes carry real numbers, also where their scale is logarithmic: 10 ms and 100 ms, never exponents.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from diffusion_lm.visualize.page import write_whole

ACROSS = 3  # panels side by side
MAX_TICKS = 12  # of a logarithmic axis that marks each of its values
PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
SUFFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
DASHES = ("--", ":", "-.")


class Line(NamedTuple):
    """ys over xs, with the ends of their confidence intervals."""

    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Panel(NamedTuple):
    """Named lines over one x axis.

    log_x   a logarithmic axis
    levels  name -> y: horizontal lines, for results that have no x
    """

    lines: Mapping[str, Line]
    x_label: str
    log_x: bool = True
    levels: Mapping[str, float] = MappingProxyType({})


def curve(
    xs: Sequence[float] | Mapping[str, Sequence[float]],
    series: Mapping[str, Sequence[float]],
    path: str | os.PathLike,
    *,
    x_label: str = "step",
    y_label: str = "loss",
    title: str = "",
    marks: Mapping[str, float] = MappingProxyType({}),
    log_x: bool = False,
    log_y: bool = False,
    y_unit: str = "",
) -> None:
    """Writes named lines over common xs, or over xs of their own, each point with a mark.

    Args:
      xs: x values, above 0 with log_x; or name -> those of each line.
      series: name -> y values, one for each x, above 0 with log_y.
      path: ends in .svg, .png or .pdf.
      x_label: the x axis' quantity, with its unit.
      y_label: the y axis' quantity; with its unit, unless y_unit is given.
      title: of the plot.
      marks: name -> x; vertical lines.
      log_x: a logarithmic x axis.
      log_y: a logarithmic y axis.
      y_unit: of the values, written at each tick with a metric prefix: 0.01 with "s" is "10 ms".

    Raises:
      ImportError: without matplotlib.
      ValueError: if a line and xs differ in length, or path has an unknown ending.
      OSError: if path cannot be written.
    """
    own = isinstance(xs, Mapping)
    over = {name: xs[name] if own else xs for name in series}
    for name, ys in series.items():
        if len(ys) != len(over[name]):
            raise ValueError(f"the line {name!r} has {len(ys)} values for {len(over[name])} xs: give one for each")
    figure = _figure("curve", (7, 4))
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, title=title)
    for at, (name, ys) in enumerate(series.items()):
        dashes = ("-", "--", ":")[at // 10 % 3]  # of 10 colours
        style = {"linestyle": dashes, "marker": "o" if own else "", "markersize": 4}
        axes.plot(over[name], ys, label=name, linewidth=1.6, **style)
    for name, x in marks.items():
        axes.axvline(x, linestyle=":", color="0.4", linewidth=1)
        beside = {"xytext": (-3, 3), "textcoords": "offset points", "rotation": 90, "ha": "right", "va": "bottom"}
        axes.annotate(name, (x, 0), xycoords=("data", "axes fraction"), fontsize="small", color="0.4", **beside)
    _scale(axes, "x", log_x, () if own else xs)
    _scale(axes, "y", log_y, unit=y_unit)
    _plain(axes)
    if series:
        figure.legend(frameon=False, loc="outside right center")
    _save(figure, path)


def panels(charts: Mapping[str, Panel], path: str | os.PathLike, *, y_label: str) -> None:
    """Writes a page with one titled panel for each chart.

    Args:
      charts: title -> panel; ys are shares in [0, 1], shown in percent.
      path: ends in .svg, .png or .pdf.
      y_label: the quantity that is a share.

    Raises:
      ImportError: without matplotlib.
      ValueError: without a chart, or if path has an unknown ending.
      OSError: if path cannot be written.
    """
    if not charts:
        raise ValueError("no chart to draw: give at least one")
    across = min(ACROSS, len(charts))
    down = -(-len(charts) // across)
    figure = _figure("panels", (4.2 * across, 3.4 * down))
    for axes, (title, chart) in zip(figure.subplots(down, across, squeeze=False).flat, charts.items(), strict=False):
        axes.set(title=title, xlabel=chart.x_label, ylabel=f"{y_label}, %", ylim=(-2, 102))
        _draw(axes, chart)
    for axes in list(figure.axes)[len(charts) :]:
        axes.remove()
    _save(figure, path)


def _draw(axes, chart: Panel) -> None:
    for at, (name, line) in enumerate(chart.lines.items()):
        ys, low, high = ([100 * y for y in of] for of in line[1:])
        style = ("-", "--")[at % 2]  # a line shows under one that covers it
        (drawn,) = axes.plot(line.xs, ys, label=name, linewidth=1.6, marker="o", markersize=3, linestyle=style)
        axes.fill_between(line.xs, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    for (name, y), dashes in zip(chart.levels.items(), DASHES * len(chart.levels), strict=False):
        axes.axhline(100 * y, label=name, linewidth=1.2, linestyle=dashes, color="0.4")
    if ticks := sorted({x for line in chart.lines.values() for x in line.xs}):
        axes.set_xticks(ticks)
        _scale(axes, "x", chart.log_x, ticks)
    _plain(axes)
    axes.legend(frameon=False, fontsize=8)


def tick_label(value: float, unit: str = "") -> str:
    """A number as an axis shows it: 0.01 with "s" is "10 ms", 18000 is "18k", 0.5 is "0.5"."""
    if not unit:
        size, suffix = next((pair for pair in SUFFIXES if abs(value) >= 10 * pair[0]), (1.0, ""))
        return _digits(value / size) + suffix
    size, prefix = next((pair for pair in PREFIXES if abs(value) >= pair[0] * 0.9999), PREFIXES[0])
    return f"{_digits(value / size)} {prefix}{unit}"


def _digits(value: float) -> str:
    """Six significant digits, never as a power of ten."""
    return np.format_float_positional(float(f"{value:.6g}"), trim="-")


def _scale(axes, which: str, log: bool, values: Sequence[float] = (), unit: str = "") -> None:
    """Plain numbers at an axis' ticks; a logarithmic one's are at its values if few, else at 1, 2 and 5 of a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        axes.set(**{f"{which}scale": "log"})
        few = 0 < len(set(values)) <= MAX_TICKS
        axis.set_major_locator(FixedLocator(sorted(set(values))) if few else LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value, unit)))


def _plain(axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(what: str, size: tuple[float, float]):
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'diffusion_lm[viz]'") from error
    return Figure(figsize=size, layout="constrained", dpi=150)


def _save(figure, path: str | os.PathLike) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix.removeprefix("."))
    write_whole(path, image.getvalue())
