"""What a trace sends to a terminal, and what a reader sees."""

import io
import re

import numpy as np
import pytest

from diffusion_lm.visualize.frames import Frame, Trace
from diffusion_lm.visualize.glyphs import MASK, columns, glyphs, lines, safe
from diffusion_lm.visualize.terminal import play, render

SGR = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\r", "\b\b", "\x7f", "\u202e", "\ud800", "\u2028", "\u009d52;c;"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def frame(tokens, state, step=1):
    return Frame(tokens=tokens, state=np.array(state), confidence=np.full(len(tokens), np.nan), canvas=0, step=step)


def text(picture):
    """The text without header, colour, brackets and line breaks."""
    return re.sub(r"[\s\[\]‹›↵]", "", SGR.sub("", picture).split("\n", 1)[1])


def test_states_differ_without_colour_and_with_it():
    some = frame(["Once", " upon", " a", "", ""], [3, 2, 1, 0, 4])
    assert render(some, width=40, colour=False).split("\n")[1] == f"‹Once› upon [a] {MASK * 3}"
    styles = {i: render(frame(["x"], [i]), width=40, colour=True).split("\n")[1] for i in range(4)}
    assert len({style.replace("x", "").replace(MASK, "").strip() for style in styles.values()}) == 4


def test_a_masked_space_is_a_block_but_a_masked_word_keeps_its_own():
    masked, final = frame(["", "", ""], [0, 0, 0]), frame([" ", " on", "\t"], [2, 2, 2])
    trace = Trace(title="t", frames=[masked, final])
    assert render(masked, width=40, colour=False, trace=trace).split("\n")[1] == f"{MASK} {MASK * 6}"


def test_the_header_names_the_denoising_step(make_trace):
    trace = make_trace(64, 5)
    assert render(trace.frames[2], width=80, colour=False, trace=trace).startswith("denoising step 2 of 5 · ")


def test_lines_break_at_the_same_places_in_every_frame(make_trace):
    trace = make_trace(256, changes=0, unused=0)
    final = trace.frames[-1]
    widths = [[sum(g.columns for g in row) for row in lines(f, width=33, final=final)] for f in trace.frames]
    assert all(len(w) == len(widths[0]) for w in widths)
    starts = [[row[0].position for row in lines(f, width=33, final=final) if row] for f in trace.frames]
    assert all(set(s) <= set(starts[0]) for s in starts)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", [2, 7, 40, 80])
def test_no_line_is_wider_than_asked(make_trace, width, colour):
    trace = make_trace(96, text="Ein 漢字仮名交じり文 über 🙂 e\u0301tude verylongwordwithoutend\t日本\n")
    for f in trace.frames:
        for line in render(f, width=width, colour=colour, trace=trace).split("\n"):
            assert sum(columns(character) for character in SGR.sub("", line)) <= width


@pytest.mark.parametrize(
    ("character", "wide"), [("a", 1), ("漢", 2), ("🙂", 2), ("\u0301", 0), ("\u200d", 0), (MASK, 1)]
)
def test_characters_have_their_columns(character, wide):
    assert columns(character) == wide


def test_all_text_of_the_last_frame_appears(make_trace):
    trace = make_trace(1024)
    written = text(render(trace.frames[-1], width=61, colour=True, trace=trace))
    assert written == re.sub(r"\s", "", "".join(trace.frames[-1].tokens))


@pytest.mark.parametrize("text_", HOSTILE)
def test_a_hostile_token_is_shown_and_not_executed(text_):
    some = frame([text_, "ok"], [1, 2])
    for colour in (False, True):
        picture = SGR.sub("", render(some, width=60, colour=colour))
        assert all(character == "\n" or character.isprintable() or character == "\u00a0" for character in picture)
        picture.encode("utf-8")
        assert "ok" in picture
    assert len(safe(text_)) >= len(text_)
    stream = Terminal()
    play(Trace(title=text_, subtitle=text_, frames=[some, some]), stream=stream, seconds_per_frame=0, width=60)
    assert text_ not in stream.getvalue() or text_ == "\r"
    assert "owned\x07" not in stream.getvalue()


def test_a_tab_takes_room_and_a_combining_mark_none():
    assert sum(g.columns for g in glyphs("\te\u0301")) == 5
    assert len(glyphs("e\u0301")) == 1


def test_not_a_terminal_gets_a_few_frames_without_escapes(make_trace):
    trace, stream = make_trace(128), io.StringIO()
    play(trace, stream=stream, seconds_per_frame=60, width=80)  # a minute per frame: it must not wait
    written = stream.getvalue()
    assert "\x1b" not in written
    assert written.startswith(f"{trace.title} — {trace.subtitle}\n")
    shown = re.findall(r"^denoising step (\d+) of 12", written, re.M)
    assert shown[0] == "0" and shown[-1] == "12" and 3 <= len(shown) < len(trace.frames)
    assert "Thou art more lovely and more temperate:" in re.sub(r"[\[\]]", "", written)


def test_a_terminal_is_redrawn_in_place_and_gets_its_cursor_back(make_trace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "12")
    monkeypatch.delenv("NO_COLOR", raising=False)
    trace, stream = make_trace(256), Terminal()
    play(trace, stream=stream, seconds_per_frame=0)
    pictures = re.split(r"\x1b\[(\d+)A\r\x1b\[J", stream.getvalue())
    heights = [picture.count("\n") for picture in pictures[0::2]]
    heights[0] -= 2  # the title and a blank line stay
    assert [int(up) for up in pictures[1::2]] == heights[:-1]  # goes up by what it wrote
    assert max(heights[:-1]) < 12 < heights[-1]  # the last frame is whole
    assert "lines above" in pictures[0] and "lines above" not in pictures[-1]
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
    assert stream.getvalue().endswith("\x1b[?25h")


def test_no_color_is_respected(make_trace, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    play(make_trace(64), stream=stream, seconds_per_frame=0, width=60)
    assert not SGR.search(stream.getvalue())


def test_nonsense_is_refused(make_trace):
    with pytest.raises(ValueError, match="width is 1"):
        render(frame(["x"], [2]), width=1, colour=False)
    with pytest.raises(ValueError, match="seconds_per_frame"):
        play(make_trace(64), stream=io.StringIO(), seconds_per_frame=float("nan"))
