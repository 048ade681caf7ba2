"""A story: what a canvas looked like after each pass, as plain NumPy, ready to be drawn."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

END_OF_TEXT = "∎"  # a tokenizer's own name for it is often empty
EMPTY = "∅"  # a committed piece without text must still be seen


class State(enum.IntEnum):
    """What a position is after a pass."""

    MASKED = 0  # noise
    JUST = 1  # committed, or changed, in this pass
    EARLIER = 2  # committed in an earlier pass
    GIVEN = 3  # the prompt
    UNUSED = 4  # after the end of text


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """A canvas of n positions after one pass.

    tokens       n pieces of text with their spaces and newlines; "" where nothing is known or used
    state        int8 [n], values of State
    probability  float32 [n], what the model gave the shown token when it was committed; nan where there is none
    canvas       counted from 0
    pass_        counted from 1 in its canvas; 0 is the canvas before its first pass

    Raises ValueError where the three differ in length, or hold a value outside those above.
    """

    tokens: Sequence[str]
    state: np.ndarray
    probability: np.ndarray
    canvas: int
    pass_: int

    def __post_init__(self):
        n = len(self.tokens)
        if np.shape(self.state) != (n,) or np.shape(self.probability) != (n,):
            shapes = f"state {np.shape(self.state)}, probability {np.shape(self.probability)}"
            raise ValueError(f"a frame of {n} tokens has {shapes}: give each the shape ({n},)")
        if not np.isin(self.state, list(State)).all():
            raise ValueError(f"a frame's state holds {np.setdiff1d(self.state, list(State))}: use the values of State")
        known = self.probability[~np.isnan(self.probability)]
        if ((known < 0) | (known > 1)).any():
            raise ValueError("a frame's probability lies outside 0..1: give probabilities, and nan where there is none")

    @property
    def committed(self) -> tuple[int, int]:
        """Positions committed so far, and positions that there are to commit."""
        count = np.bincount(self.state, minlength=len(State))
        done = int(count[State.JUST] + count[State.EARLIER])
        return done, done + int(count[State.MASKED])


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Frames of one row, in order. `meta` is shown beside them: the model, the sampler, a seed.

    Raises ValueError without a frame, or where frames differ in their number of positions.
    """

    title: str
    frames: Sequence[Frame]
    subtitle: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.frames:
            raise ValueError("a story has no frames: give one at least")
        if len({len(frame.tokens) for frame in self.frames}) > 1:
            raise ValueError("a story's frames differ in their number of positions: pad them to one width")

    def caption(self, frame: Frame) -> str:
        """Where a frame stands: canvas, pass, positions committed."""
        canvases = 1 + max(f.canvas for f in self.frames)
        passes = max(f.pass_ for f in self.frames if f.canvas == frame.canvas)
        done, total = frame.committed
        canvas = f"canvas {frame.canvas + 1} of {canvases} · " if canvases > 1 else ""
        return f"{canvas}pass {frame.pass_} of {passes} · {done} of {total} committed"


def trace_from_history(
    history_tokens: np.ndarray,
    history_probability: np.ndarray,
    *,
    prompt_length: int,
    length: int,
    mask: int,
    eos: int | None,
    pieces: Callable[[list[int]], Sequence[str]],
    title: str,
    subtitle: str = "",
    meta: Mapping[str, Any] | None = None,
    canvas: np.ndarray | None = None,
) -> Trace:
    """P passes over one row of n positions -> P + 1 frames, the first before any pass.

    history_tokens       int32 [P, n], the row after each pass; `mask` where nothing is committed
    history_probability  float32 [P, n], read where a token appears or changes
    prompt_length        positions 0 .. prompt_length - 1 were given
    length               positions from here on are unused in every frame; n if the whole row is used
    eos                  the end of text, None if the tokenizer has none; a prompt's don't count
    pieces               ids -> the text of each by itself, with its spaces and newlines; never asked for the mask
    canvas               int [P], the canvas of each pass from 0; None if there is but one

    A token that goes back to the mask is masked again; one that changes is just committed again.
    Raises ValueError on shapes and lengths that don't fit, or a mask inside the prompt.
    """
    tokens, probability = np.asarray(history_tokens), np.asarray(history_probability, np.float32)
    canvas = np.zeros(len(tokens), int) if canvas is None else np.asarray(canvas)
    _check_history(tokens, probability, canvas, prompt_length, length, mask)

    start = np.where(np.arange(tokens.shape[1]) < prompt_length, tokens[0], mask)
    tokens = np.concatenate([start[None], tokens])
    probability = np.concatenate([np.full_like(probability[:1], np.nan), probability])
    state = _states(tokens, prompt_length, length, mask, eos)
    probability = np.where(np.isin(state, (State.JUST, State.EARLIER)), _at_commit(tokens, probability), np.nan)

    text = _texts(tokens[np.isin(state, (State.JUST, State.EARLIER, State.GIVEN))], eos, pieces)
    silent = np.isin(state, (State.MASKED, State.UNUSED))
    number = [0] + [int((canvas[: p + 1] == canvas[p]).sum()) for p in range(len(canvas))]
    frames = tuple(
        Frame(
            tokens=tuple("" if quiet else text[int(token)] for token, quiet in zip(tokens[p], silent[p], strict=True)),
            state=state[p],
            probability=probability[p],
            canvas=int(canvas[max(p - 1, 0)]),
            pass_=number[p],
        )
        for p in range(len(tokens))
    )
    return Trace(title=title, frames=frames, subtitle=subtitle, meta=dict(meta or {}))


def _check_history(tokens, probability, canvas, prompt_length, length, mask):
    if tokens.ndim != 2 or not tokens.size or tokens.shape != probability.shape:
        shapes = f"tokens {tokens.shape}, probability {probability.shape}"
        raise ValueError(f"a history has {shapes}: give both as [passes, positions], for one row, not empty")
    if canvas.shape != tokens.shape[:1]:
        raise ValueError(f"canvas has shape {canvas.shape} for {len(tokens)} passes: name the canvas of each pass")
    if not 0 <= prompt_length <= length <= tokens.shape[1]:
        raise ValueError(
            f"prompt_length {prompt_length} and length {length} don't fit {tokens.shape[1]} positions: "
            "0 <= prompt_length <= length <= positions"
        )
    if (tokens[:, :prompt_length] == mask).any() or (tokens[:, :prompt_length] != tokens[0, :prompt_length]).any():
        raise ValueError("the prompt holds a mask, or changes between passes: prompt_length is too long for it")


def _states(tokens, prompt_length, length, mask, eos):
    """int32 [P + 1, n] with the start in front -> State, int8 [P + 1, n]."""
    before = np.concatenate([tokens[:1], tokens[:-1]])
    at = np.arange(tokens.shape[1])
    state = np.where(tokens == mask, State.MASKED, np.where(tokens != before, State.JUST, State.EARLIER))
    state = np.where(at < prompt_length, State.GIVEN, state)
    ends = (tokens == eos) & (at >= prompt_length) if eos is not None else np.zeros(tokens.shape, bool)
    after_end = np.cumsum(ends, axis=1) - ends > 0
    return np.where(after_end | (at >= length), State.UNUSED, state).astype(np.int8)


def _at_commit(tokens, probability):
    """Each position keeps the probability of the pass in which its token appeared."""
    kept = probability.copy()
    for p in range(1, len(tokens)):
        kept[p] = np.where(tokens[p] != tokens[p - 1], probability[p], kept[p - 1])
    return kept


def _texts(ids, eos, pieces):
    """{id: its text} for the ids that occur."""
    ids = [int(i) for i in np.unique(ids)]
    texts = list(pieces(ids))
    if len(texts) != len(ids):
        raise ValueError(f"pieces gave {len(texts)} texts for {len(ids)} ids: it must give one for each")
    return {i: END_OF_TEXT if i == eos else text or EMPTY for i, text in zip(ids, texts, strict=True)}
