"""The canvas in a terminal: redrawn in place where somebody watches, a few plain frames where nobody does."""

import math
import os
import shutil
import time
from itertools import groupby
from typing import TextIO

import numpy as np

from diffusion_lm.visualize.frames import Frame, State, Trace
from diffusion_lm.visualize.glyphs import glyphs, lines, wrap

RESET = "\x1b[0m"
STYLE = {  # legible on dark and on light
    State.MASKED: "\x1b[38;5;245m",
    State.JUST: "\x1b[1;38;5;16;48;5;115m",
    State.EARLIER: "",
    State.GIVEN: "\x1b[2;4m",
}
FRAMES_WITHOUT_TTY = 5
CONTEXT = 3  # lines kept in view above the first masked one


def render(frame: Frame, *, width: int, colour: bool, trace: Trace | None = None) -> str:
    """A header and the frame's text, each line at most `width` columns, without a newline at the end.

    Masked positions are blocks. With colour, just committed text is highlighted and given text dim and underlined;
    without, they stand in [ ] and in ‹ ›. With its story, the frame's lines break where those of the last frame do.
    Control characters in the pieces are made visible, never sent. Raises ValueError if width < 2.
    """
    return "\n".join(_header(frame, width, trace) + _body(frame, width, colour, trace)[0])


def play(trace: Trace, *, stream: TextIO, seconds_per_frame: float, width: int | None = None) -> None:
    """Show a story on a stream.

    On a terminal every frame replaces the one before it, in colour unless NO_COLOR is set; where a frame is taller
    than the terminal, the part around the first masked line is shown, and the last frame is printed whole. Anywhere
    else: the first, the last and a few frames between, without escape codes or waiting.
    Raises ValueError if seconds_per_frame is negative or not finite, or width < 2.
    """
    if not (math.isfinite(seconds_per_frame) and seconds_per_frame >= 0):
        raise ValueError(f"seconds_per_frame is {seconds_per_frame}: give a number of seconds from 0 up")
    size = shutil.get_terminal_size()
    width = size.columns if width is None else width
    title = "\n".join(_text_lines(f"{trace.title} — {trace.subtitle}" if trace.subtitle else trace.title, width))
    if stream.isatty():
        _play_in_place(trace, title, stream, seconds_per_frame, width, size.lines)
        return
    shown = np.unique(np.linspace(0, len(trace.frames) - 1, FRAMES_WITHOUT_TTY).round().astype(int))
    text = [render(trace.frames[i], width=width, colour=False, trace=trace) for i in shown]
    stream.write("\n\n".join([title, *text]) + "\n")


def _play_in_place(trace, title, stream, seconds, width, height):
    colour = "NO_COLOR" not in os.environ
    up = ""
    stream.write(f"{title}\n\n\x1b[?25l")  # the cursor hides
    try:
        for frame in trace.frames[:-1]:
            picture = _window(frame, width, height, colour, trace)
            stream.write(up + "\n".join(picture) + "\n")
            stream.flush()
            up = f"\x1b[{len(picture)}A\r\x1b[J"
            time.sleep(seconds)
        stream.write(up + render(trace.frames[-1], width=width, colour=colour, trace=trace) + "\n")
    finally:
        stream.write("\x1b[?25h")
        stream.flush()


def _window(frame, width, height, colour, trace):
    """The lines of a frame that fit a terminal's height: a cursor can't go up beyond its top."""
    header = _header(frame, width, trace)
    body, front = _body(frame, width, colour, trace)
    room = max(height - len(header) - 3, 1)  # a line tells what is hidden, one holds the cursor, the top stays free
    if len(body) <= room + 1:
        return header + body
    start = min(max(front - CONTEXT, 0), len(body) - room)
    hidden = f"… {start} lines above, {len(body) - room - start} below"
    return header + body[start : start + room] + _text_lines(hidden, width)[:1]


def _header(frame, width, trace):
    caption = trace.caption(frame) if trace else "pass {} · {} of {} committed".format(frame.pass_, *frame.committed)
    return _text_lines(caption, width)


def _text_lines(text, width):
    return ["".join(glyph.text for glyph in line) for line in wrap(glyphs(" ".join(text.split())), width)]


def _body(frame, width, colour, trace):
    """Painted lines, and the number of the first that holds a masked position."""
    rows = lines(frame, width=width, final=trace.frames[-1] if trace else None, marks=not colour)
    masked = (r for r, row in enumerate(rows) if any(g.position >= 0 and not frame.state[g.position] for g in row))
    return [_paint(row, frame, colour) for row in rows], next(masked, 0)


def _paint(row, frame, colour):
    """One line; every style that it opens it also closes."""
    if not colour:
        return "".join(glyph.text for glyph in row)
    painted = ""
    for style, run in groupby(row, key=lambda glyph: STYLE[State(frame.state[glyph.position])]):
        text = "".join(glyph.text for glyph in run)
        painted += f"{style}{text}{RESET}" if style else text
    return painted
