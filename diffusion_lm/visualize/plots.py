"""Still pictures: one canvas at a few passes, and curves over training."""

import io
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from xml.sax.saxutils import escape

import numpy as np

from diffusion_lm.visualize.frames import State, Trace
from diffusion_lm.visualize.glyphs import lines
from diffusion_lm.visualize.page import write_whole

ADVANCE, LEADING, SIZE = 7.8, 21, 13  # pixels: a character's width, a line's height, the font
PAD, HEAD, GAP, FOOT = 18, 46, 16, 34
DOUBTS = 5  # shades from sure to unsure
COLOURS = {  # on light, on dark
    "ink": ("#23262b", "#e4e3de"),
    "soft": ("#5c626c", "#a0a6b1"),
    "panel": ("#fbfaf6", "#171a1f"),
    "line": ("#e2dfd6", "#30353e"),
    "mask": ("#dfdcd2", "#363c48"),
    "just": ("#a9e8d0", "#3fc79d"),
    "just-ink": ("#06372a", "#03251a"),
    "given": ("#4b5f86", "#9db4e3"),
    "doubt": ("#e07b00", "#ff9628"),
    "accent": ("#0b7a5c", "#4fd3aa"),
}
INK = {State.JUST: "just-ink", State.EARLIER: "ink", State.GIVEN: "given"}


def denoising_picture(
    trace: Trace,
    path: str | os.PathLike,
    *,
    passes: Sequence[int] | None = None,
    columns: int = 50,
    across: int = 2,
) -> None:
    """Write an SVG of the same canvas after the named passes, each a panel of `columns` characters a line.

    passes are indices of story.frames, by default four from the first to the last; `across` panels stand in a row.
    It follows the reader's light or dark setting. Raises ValueError where path doesn't end in .svg or a pass isn't
    in the story, OSError where path cannot be written.
    """
    last = len(trace.frames) - 1
    if passes is None:
        passes = np.unique(np.linspace(0, last, 4).round().astype(int)).tolist()
    if Path(path).suffix != ".svg":
        raise ValueError(f"the picture is an SVG: name a file that ends in .svg, not {Path(path).name}")
    if not len(passes) or not all(0 <= p <= last for p in passes) or across < 1:
        raise ValueError(f"passes {tuple(passes)}, {across} across: name some of 0..{last}, and put 1 or more in a row")
    write_whole(path, _picture(trace, [trace.frames[p] for p in passes], columns, across).encode())


def curve(
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    path: str | os.PathLike,
    *,
    x_label: str = "step",
    y_label: str = "loss",
    title: str = "",
    marks: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Write named lines over common xs as .svg, .png or .pdf. marks: named places on the x axis.

    Raises ImportError without matplotlib, ValueError where a line and xs differ in length or matplotlib doesn't know
    the ending, OSError where path cannot be written.
    """
    for name, ys in series.items():
        if len(ys) != len(xs):
            raise ValueError(f"the line {name!r} has {len(ys)} values for {len(xs)} xs: give one for each")
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("curve needs matplotlib: pip install 'diffusion_lm[viz]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, title=title)
    for at, (name, ys) in enumerate(series.items()):
        axes.plot(xs, ys, label=name, linewidth=1.6, linestyle=("-", "--", ":")[at // 10 % 3])  # of 10 colours
    for name, x in marks.items():
        axes.axvline(x, linestyle=":", color="0.4", linewidth=1)
        beside = {"xytext": (-3, 3), "textcoords": "offset points", "rotation": 90, "ha": "right", "va": "bottom"}
        axes.annotate(name, (x, 0), xycoords=("data", "axes fraction"), fontsize="small", color="0.4", **beside)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        figure.legend(frameon=False, loc="outside right center")
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix.removeprefix("."))
    write_whole(path, image.getvalue())


def _picture(trace, frames, columns, across):
    final = trace.frames[-1]
    texts = [lines(frame, width=columns, final=final) for frame in frames]
    wide = columns * ADVANCE + 2 * PAD
    high = HEAD + max(map(len, texts)) * LEADING + PAD - 6
    rows = -(-len(frames) // across)
    width = min(across, len(frames)) * (wide + GAP) - GAP + 2
    height = rows * (high + GAP) - GAP + FOOT
    panels = [
        f'<g transform="translate({1 + k % across * (wide + GAP):g} {1 + k // across * (high + GAP):g})">'
        f"{_panel(trace, frame, text, wide, high)}</g>"
        for k, (frame, text) in enumerate(zip(frames, texts, strict=True))
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img"><title>{_clean(trace.title)}</title>'
        f"<desc>{_clean('; '.join(map(trace.caption, frames)))}</desc>"
        f"<style>{_style()}</style>{''.join(panels)}{_legend(height - 11)}</svg>\n"
    )


def _style():
    """Colours as classes: fills of blocks b-, inks of text t-, shades of doubt d0 .. d4."""

    def colours(side):
        palette = {name: pair[side] for name, pair in COLOURS.items()}
        both = (f".b-{name}{{fill:{c};stroke:{c}}}.t-{name}{{fill:{c}}}" for name, c in palette.items())
        shades = (f".d{k}{{fill:{palette['doubt']};stroke:{palette['doubt']}}}" for k in range(DOUBTS))
        return "".join([*both, *shades, f".panel{{fill:{palette['panel']};stroke:{palette['line']}}}"])

    faces = "ui-monospace,'SF Mono','Cascadia Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"
    opacity = "".join(f".d{k}{{opacity:{0.4 * k / (DOUBTS - 1):.2g}}}" for k in range(DOUBTS))
    return (
        f"text{{font:{SIZE}px {faces};white-space:pre}}.h{{font:600 14px system-ui,sans-serif}}"
        ".l{font:12.5px system-ui,sans-serif}path{stroke-width:4;stroke-linejoin:round}"
        f"{opacity}{colours(0)}@media(prefers-color-scheme:dark){{{colours(1)}}}"
    )


def _panel(trace, frame, text, wide, high):
    done, total = frame.committed
    share = done / max(total, 1) * (wide - 2 * PAD)
    where = trace.caption(frame).rsplit(" · ", 1)[0]
    parts = [
        f'<rect class="panel" width="{wide:g}" height="{high:g}" rx="10"/>',
        f'<text class="h t-ink" x="{PAD}" y="23">{_clean(where)}</text>',
        f'<text class="l t-soft" x="{wide - PAD:g}" y="23" text-anchor="end">{done} of {total} committed</text>',
        f'<rect class="t-line" x="{PAD}" y="31" width="{wide - 2 * PAD:g}" height="3" rx="1.5"/>',
        f'<rect class="t-accent" x="{PAD}" y="31" width="{share:.5g}" height="3" rx="1.5"/>' if done else "",
        *_blocks(frame, text),
    ]
    for r, row in enumerate(text):
        parts += _inked(frame, row, HEAD + r * LEADING + 15)
    return "".join(parts)


def _placed(row):
    """Each glyph with its column."""
    at = 0
    for glyph in row:
        yield at, glyph
        at += glyph.columns


def _blocks(frame, text):
    """One path a shade: the rectangles behind the tokens."""
    found: dict[str, list[str]] = {}
    for r, row in enumerate(text):
        for i, run in groupby(_placed(row), key=lambda placed: placed[1].position):
            shown = [(at, glyph) for at, glyph in run if glyph.text.strip()]
            shade = _shade(frame, i)
            if shown and shade:
                x = PAD + shown[0][0] * ADVANCE + 2.5
                width = (shown[-1][0] + shown[-1][1].columns - shown[0][0]) * ADVANCE - 5
                box = f"M{x:.1f} {HEAD + r * LEADING + 4}h{width:.1f}v13h{-width:.1f}z"
                found.setdefault(shade, []).append(box)
    return [f'<path class="{shade}" d="{"".join(boxes)}"/>' for shade, boxes in found.items()]


def _shade(frame, i):
    if frame.state[i] == State.MASKED:
        return "b-mask"
    if frame.state[i] == State.JUST:
        return "b-just"
    doubt = 0.0 if np.isnan(frame.probability[i]) else 1 - frame.probability[i]
    level = round(float(doubt) * (DOUBTS - 1))
    return f"d{level}" if level else ""


def _inked(frame, row, y):
    """The line's visible words, each held to its columns whatever font the reader has."""

    def ink(placed):
        glyph = placed[1]
        return INK.get(State(frame.state[glyph.position])) if glyph.text.strip() else None

    for name, run in groupby(_placed(row), key=ink):
        run = list(run)
        if name:
            x, size = PAD + run[0][0] * ADVANCE, sum(glyph.columns for _, glyph in run) * ADVANCE
            word = escape("".join(glyph.text for _, glyph in run))
            yield f'<text class="t-{name}" x="{x:.1f}" y="{y}" textLength="{size:.1f}">{word}</text>'


def _legend(y):
    x, parts = 8.0, []
    shown = {"b-mask": "masked", "b-just": "committed in this pass", f"d{DOUBTS - 1}": "committed before, unsure"}
    for shade, name in shown.items():
        parts.append(f'<path class="{shade}" d="M{x:g} {y - 8:g}h16v7h-16z"/>')
        parts.append(f'<text class="l t-soft" x="{x + 26:g}" y="{y:g}">{name}</text>')
        x += 58 + 6.2 * len(name)
    return "".join(parts)


def _clean(text):
    """Words of a caller as XML text."""
    return escape("".join(character if character.isprintable() else " " for character in text))
