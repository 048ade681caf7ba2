"""A trace as one HTML file that needs nothing else: play it, step through it, see each token's confidence."""

import contextlib
import html
import json
import math
import os
from importlib.resources import files
from pathlib import Path

import numpy as np

from diffusion_lm.visualize.frames import Trace


def write_page(trace: Trace, path: str | os.PathLike) -> None:
    """Writes the page, all of it or nothing. `#frame=7` in its address opens frame 7.

    Raises:
      OSError: naming the path and the remedy, if it cannot be written.
    """
    template = files("diffusion_lm.visualize").joinpath("page.html").read_text(encoding="utf-8")
    head, rest = template.split("{{title}}")
    middle, rest = rest.split("{{text}}")
    data, tail = rest.split("{{trace}}")
    text = "".join(trace.frames[-1].tokens)
    parts = head, html.escape(trace.title), middle, html.escape(text), data, _json(trace), tail
    write_whole(path, "".join(parts).encode("utf-8", "xmlcharrefreplace"))


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes content to path in one move, so that nobody reads half of it. Raises OSError, naming path and remedy."""
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


def _json(trace: Trace) -> str:
    """The trace as JSON. `set` lists [position, text, confidence] where a frame differs from the one before.

    No HTML parser can mistake it for markup: it is ASCII without < > &.
    """
    index = {text: i for i, text in enumerate(dict.fromkeys(t for frame in trace.frames for t in frame.tokens))}
    shown: list[tuple] = [(None, None)] * len(trace.frames[0].tokens)
    frames = []
    for frame in trace.frames:
        confidence = [None if math.isnan(c) else round(float(c), 4) for c in np.asarray(frame.confidence)]
        now = [(index[text], c) for text, c in zip(frame.tokens, confidence, strict=True)]
        changes = [[i, *new] for i, (new, old) in enumerate(zip(now, shown, strict=True)) if new != old]
        state = "".join(str(int(s)) for s in frame.state)
        frames.append({"caption": trace.caption(frame), "state": state, "set": changes, "canvas": int(frame.canvas)})
        shown = now
    meta = {str(key): str(value) for key, value in trace.meta.items()}
    value = {"title": trace.title, "subtitle": trace.subtitle, "meta": meta, "texts": list(index), "frames": frames}
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
