"""A story as one HTML file that needs nothing else: play it, step through it, ask any token how sure the model was."""

import contextlib
import html
import json
import math
import os
from importlib.resources import files
from pathlib import Path

import numpy as np

from diffusion_lm.visualize.frames import Frame, Trace


def write_page(trace: Trace, path: str | os.PathLike) -> None:
    """Write the page, whole or not at all. `#pass=7` in its address opens frame 7.

    Raises an OSError that names the path and the remedy where it cannot be written.
    """
    template = files("diffusion_lm.visualize").joinpath("page.html").read_text(encoding="utf-8")
    head, rest = template.split("{{title}}")
    middle, rest = rest.split("{{text}}")
    data, tail = rest.split("{{story}}")
    text = "".join(trace.frames[-1].tokens)
    parts = head, html.escape(trace.title), middle, html.escape(text), data, _embedded(_told(trace)), tail
    write_whole(path, "".join(parts).encode("utf-8", "xmlcharrefreplace"))


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Put content at path in one move, so that nobody ever reads half of it. Raises OSError, naming path and remedy."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        remedy = "name a file in a folder that exists and that you may write to"
        raise OSError(error.errno, f"cannot write ({error.strerror}): {remedy}", str(path)) from error


def _told(trace: Trace) -> dict:
    """The story as JSON values. `set` lists [position, piece, probability] wherever a frame differs from the last."""
    piece = {text: i for i, text in enumerate(dict.fromkeys(t for frame in trace.frames for t in frame.tokens))}
    shown: list[tuple] = [(None, None)] * len(trace.frames[0].tokens)
    frames = []
    for frame in trace.frames:
        now = _shown(frame, piece)
        changes = [[i, *new] for i, (new, old) in enumerate(zip(now, shown, strict=True)) if new != old]
        state = "".join(str(int(s)) for s in frame.state)
        frames.append({"caption": trace.caption(frame), "state": state, "set": changes, "canvas": int(frame.canvas)})
        shown = now
    meta = {str(key): str(value) for key, value in trace.meta.items()}
    return {"title": trace.title, "subtitle": trace.subtitle, "meta": meta, "pieces": list(piece), "frames": frames}


def _shown(frame: Frame, piece: dict[str, int]) -> list[tuple]:
    sure = [None if math.isnan(p) else round(float(p), 4) for p in np.asarray(frame.probability)]
    return [(piece[text], p) for text, p in zip(frame.tokens, sure, strict=True)]


def _embedded(value: dict) -> str:
    """JSON that no HTML parser can mistake for markup: ASCII, without < > &."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
