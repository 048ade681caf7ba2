"""A trace in a terminal: redrawn in place on a terminal, a few plain frames in a file or a pipe."""

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
CONTEXT = 3  # lines shown above the first masked one


def render(frame: Frame, *, width: int, colour: bool, trace: Trace | None = None) -> str:
    """A header and the frame's text, without a newline at the end.

    Masked positions are blocks. Control characters in tokens are made visible, never sent.

    Args:
      frame: what to show.
      width: columns of a line at most, at least 2.
      colour: highlights text committed in this step and dims the prompt; without, they are in [ ] and ‹ ›.
      trace: the frame's; lines then break at the same places in all of its frames.

    Raises:
      ValueError: if width < 2.
    """
    return "\n".join(_header(frame, width, trace) + _body(frame, width, colour, trace)[0])


def play(trace: Trace, *, stream: TextIO, seconds_per_frame: float, width: int | None = None) -> None:
    """Shows a trace on a stream.

    On a terminal each frame replaces the one before, in colour unless NO_COLOR is set. Of a frame taller than the
    terminal the part around the first masked line is shown; the last frame is printed whole. Any other stream gets the
    first, the last and a few frames between, without escape codes or waiting.

    Args:
      trace: what to show.
      stream: a text stream.
      seconds_per_frame: at least 0.
      width: columns; None: the terminal's.

    Raises:
      ValueError: if seconds_per_frame is negative or not finite, or width < 2.
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
    stream.write(f"{title}\n\n\x1b[?25l")  # hides the cursor
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
    """The lines of a frame that fit a terminal's height: the cursor can't move above its top."""
    header = _header(frame, width, trace)
    body, front = _body(frame, width, colour, trace)
    room = max(height - len(header) - 3, 1)  # less a line for what is hidden, one for the cursor, one free at the top
    if len(body) <= room + 1:
        return header + body
    start = min(max(front - CONTEXT, 0), len(body) - room)
    hidden = f"… {start} lines above, {len(body) - room - start} below"
    return header + body[start : start + room] + _text_lines(hidden, width)[:1]


def _header(frame, width, trace):
    caption = (
        trace.caption(frame) if trace else "denoising step {} · {} of {} committed".format(frame.step, *frame.committed)
    )
    return _text_lines(caption, width)


def _text_lines(text, width):
    return ["".join(glyph.text for glyph in line) for line in wrap(glyphs(" ".join(text.split())), width)]


def _body(frame, width, colour, trace):
    """Painted lines, and the index of the first with a masked position."""
    rows = lines(frame, width=width, final=trace.frames[-1] if trace else None, marks=not colour)
    masked = (r for r, row in enumerate(rows) if any(g.position >= 0 and not frame.state[g.position] for g in row))
    return [_paint(row, frame, colour) for row in rows], next(masked, 0)


def _paint(row, frame, colour):
    """One line; it closes each style that it opens."""
    if not colour:
        return "".join(glyph.text for glyph in row)
    painted = ""
    for style, run in groupby(row, key=lambda glyph: STYLE[State(frame.state[glyph.position])]):
        text = "".join(glyph.text for glyph in run)
        painted += f"{style}{text}{RESET}" if style else text
    return painted
