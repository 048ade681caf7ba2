"""Model output as characters on a grid: escaped, measured, and broken into lines that are stable between frames."""

import unicodedata
from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from diffusion_lm.visualize.frames import Frame, State

MASK = "░"
NEWLINE = "↵"
UNKNOWN = " ░░░"  # a masked position whose final text is unknown
BLANK = (" ", "\u00a0")
JOINERS = "\u200c\u200d"
MARKS = {State.JUST: "[]", State.GIVEN: "‹›"}  # without colour


class Glyph(NamedTuple):
    """One character, its columns, and its token's position (-1 for our own marks).

    A line may break at a `space`.
    """

    text: str
    columns: int
    position: int
    space: bool = False


def safe(text: str) -> str:
    """The text with each control, direction override, surrogate and unassigned character made visible.

    Newlines stay and a tab becomes four spaces; nothing is left that a terminal would execute.
    """
    return "".join(character if character == "\n" else _safe(character) for character in text)


def _safe(character: str) -> str:
    if character == "\t":
        return "    "
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # the control's symbol: ␛ for escape
    if character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character
    return character.encode("ascii", "backslashreplace").decode() if ord(character) > 0x7F else "␡"


def columns(character: str) -> int:
    """Terminal columns of a safe character; the larger number where terminals disagree, so that no line overflows."""
    if character == "\ufe0f":
        return 1  # it may widen the character before it
    if character in JOINERS or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def lines(frame: Frame, *, width: int, final: Frame | None = None, marks: bool = False) -> list[list[Glyph]]:
    """The frame's text broken at spaces into lines of at most `width` columns.

    Args:
      frame: what to lay out.
      width: columns, at least 2.
      final: the trace's last frame; masked positions take the width of its text, so that lines break at the same
        places in every frame.
      marks: puts text committed in this step, and the prompt, in brackets.

    Raises:
      ValueError: if width < 2.
    """
    if width < 2:
        raise ValueError(f"width is {width}: a wide character needs 2 columns")
    flow = [_cell(frame, i, final) for i in range(len(frame.tokens))]
    rows = wrap(_marked(frame, flow) if marks else [glyph for cell in flow for glyph in cell], width)
    return [row[: len(row) - sum(1 for _ in takewhile(lambda g: g.text in BLANK, reversed(row)))] for row in rows]


def glyphs(text: str, position: int = -1) -> list[Glyph]:
    """Safe text as glyphs: a combining character joins the one before it, a newline is ↵ and then a break."""
    found: list[Glyph] = []
    for character in safe(text):
        size = columns(character)
        if character == "\n":
            found += [Glyph(NEWLINE, 1, position), Glyph("\n", 0, position)]
        elif size == 0 and found and found[-1].columns:
            found[-1] = found[-1]._replace(text=found[-1].text + character)
        else:
            found.append(Glyph(character, size, position, character == " "))
    return found


def wrap(flow: Iterable[Glyph], width: int) -> list[list[Glyph]]:
    """Greedy lines, broken at the last space that fits (which is dropped), or inside a word longer than a line."""
    done: list[list[Glyph]] = []
    line: list[Glyph] = []
    for glyph in flow:
        if glyph.text == "\n":
            done.append(line)
            line = []
        elif _width(line) + glyph.columns <= width:
            line = [*line, glyph]
        elif glyph.space:
            done.append(line)
            line = []
        else:
            space = max((i for i, g in enumerate(line) if g.space), default=None)
            head, tail = (line, []) if space is None else (line[:space], line[space + 1 :])
            done.append(head)
            line = [*tail, glyph]
    return [*done, line] if line or not done else done


def _width(line):
    return sum(glyph.columns for glyph in line)


def _cell(frame, i, final):
    """The glyphs of position i."""
    state = frame.state[i]
    room = glyphs((final.tokens[i] if final else "") or UNKNOWN, i)
    if state == State.UNUSED:
        return []
    if state == State.MASKED:
        blank = all(g.space for g in room)  # a token of only spaces is a block too
        return [g if g.text == "\n" or (g.space and not blank) else g._replace(text=MASK * g.columns) for g in room]
    shown = glyphs(frame.tokens[i], i)
    if state != State.JUST:  # ↵ is shown once, then its column stays blank
        shown = [g._replace(text=BLANK[1]) if g.text == NEWLINE else g for g in shown]
    return shown + [Glyph(" ", 1, i, True)] * (_width(room) - _width(shown) if final else 0)


def _marked(frame, flow):
    """All glyphs, with brackets around each run of a marked state."""
    marked: list[Glyph] = []
    for i, cell in enumerate(flow):
        pair = MARKS.get(frame.state[i])
        first = pair and (i == 0 or frame.state[i - 1] != frame.state[i])
        last = pair and (i + 1 == len(flow) or frame.state[i + 1] != frame.state[i])
        if first:
            start = next((k for k, g in enumerate(cell) if g.text != " "), 0)
            cell = [*cell[:start], Glyph(pair[0], 1, -1), *cell[start:]]
        if last:
            end = len(cell) - (bool(cell) and cell[-1].text == "\n")
            cell = [*cell[:end], Glyph(pair[1], 1, -1), *cell[end:]]
        marked += cell
    return marked
