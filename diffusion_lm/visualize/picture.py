"""A still picture: one canvas after a few of its denoising steps, as an SVG."""

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from diffusion_lm.visualize.frames import State, Trace
from diffusion_lm.visualize.glyphs import lines
from diffusion_lm.visualize.page import write_whole

ADVANCE, LEADING, SIZE = 7.8, 21, 13  # pixels: a character's width, a line's height, the font
PAD, HEAD, GAP, FOOT = 18, 46, 16, 34
SHADES = 5  # from high to low confidence
COLOURS = {  # on light, on dark
    "ink": ("#23262b", "#e4e3de"),
    "soft": ("#5c626c", "#a0a6b1"),
    "panel": ("#fbfaf6", "#171a1f"),
    "line": ("#e2dfd6", "#30353e"),
    "mask": ("#dfdcd2", "#363c48"),
    "just": ("#a9e8d0", "#3fc79d"),
    "just-ink": ("#06372a", "#03251a"),
    "given": ("#4b5f86", "#9db4e3"),
    "unsure": ("#e07b00", "#ff9628"),
    "accent": ("#0b7a5c", "#4fd3aa"),
}
INK = {State.JUST: "just-ink", State.EARLIER: "ink", State.GIVEN: "given"}


def denoising_picture(
    trace: Trace,
    path: str | os.PathLike,
    *,
    frames: Sequence[int] | None = None,
    columns: int = 50,
    across: int = 2,
) -> None:
    """Writes an SVG of the same canvas at several frames of a trace, each in its own panel.

    Colours follow the reader's light or dark setting.

    Args:
      trace: what a canvas went through.
      path: ends in .svg.
      frames: indices into trace.frames; None: four from the first to the last.
      columns: characters of a line.
      across: panels side by side.

    Raises:
      ValueError: if path doesn't end in .svg, or the trace has no such frame.
      OSError: if path cannot be written.
    """
    last = len(trace.frames) - 1
    if frames is None:
        frames = np.unique(np.linspace(0, last, 4).round().astype(int)).tolist()
    if Path(path).suffix != ".svg":
        raise ValueError(f"the picture is an SVG: name a file that ends in .svg, not {Path(path).name}")
    if not len(frames) or not all(0 <= i <= last for i in frames) or across < 1:
        raise ValueError(f"frames must be some of 0..{last}, and across at least 1; got {tuple(frames)} and {across}")
    write_whole(path, _picture(trace, [trace.frames[i] for i in frames], columns, across).encode())


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
    """Colours as classes: fills of blocks b-, of text t-, shades of low confidence d0 .. d4."""

    def colours(side):
        palette = {name: pair[side] for name, pair in COLOURS.items()}
        both = (f".b-{name}{{fill:{c};stroke:{c}}}.t-{name}{{fill:{c}}}" for name, c in palette.items())
        shades = (f".d{k}{{fill:{palette['unsure']};stroke:{palette['unsure']}}}" for k in range(SHADES))
        return "".join([*both, *shades, f".panel{{fill:{palette['panel']};stroke:{palette['line']}}}"])

    faces = "ui-monospace,'SF Mono','Cascadia Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"
    opacity = "".join(f".d{k}{{opacity:{0.4 * k / (SHADES - 1):.2g}}}" for k in range(SHADES))
    return (
        f"text{{font:{SIZE}px {faces};white-space:pre}}.h{{font:600 14px system-ui,sans-serif}}"
        ".l{font:12.5px system-ui,sans-serif}path{stroke-width:4;stroke-linejoin:round}"
        f"{opacity}{colours(0)}@media(prefers-color-scheme:dark){{{colours(1)}}}"
    )


def _panel(trace, frame, text, wide, high):
    done, total = frame.committed
    share = done / max(total, 1) * (wide - 2 * PAD)
    where = trace.caption(frame).rsplit(" · ", 1)[0].replace("denoising step", "step")  # fits beside the count
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
    """Yields (column, glyph)."""
    at = 0
    for glyph in row:
        yield at, glyph
        at += glyph.columns


def _blocks(frame, text):
    """One path per shade: the rectangles behind the tokens."""
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
    unsure = 0.0 if np.isnan(frame.confidence[i]) else 1 - frame.confidence[i]
    level = round(float(unsure) * (SHADES - 1))
    return f"d{level}" if level else ""


def _inked(frame, row, y):
    """The line's visible words, each stretched to its columns in any font."""

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
    shown = {"b-mask": "masked", "b-just": "committed in this step", f"d{SHADES - 1}": "committed with low confidence"}
    for shade, name in shown.items():
        parts.append(f'<path class="{shade}" d="M{x:g} {y - 8:g}h16v7h-16z"/>')
        parts.append(f'<text class="l t-soft" x="{x + 26:g}" y="{y:g}">{name}</text>')
        x += 58 + 6.2 * len(name)
    return "".join(parts)


def _clean(text):
    """A caller's text as XML text."""
    return escape("".join(character if character.isprintable() else " " for character in text))
