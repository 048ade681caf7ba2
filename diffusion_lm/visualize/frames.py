"""A trace: a canvas after each denoising step, as plain NumPy, ready to be drawn."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

END_OF_TEXT = "∎"  # a tokenizer's own name for it is often empty
EMPTY = "∅"  # shows a committed token without text


class State(enum.IntEnum):
    """What a position is after a denoising step."""

    MASKED = 0  # not committed
    JUST = 1  # committed or changed in this step
    EARLIER = 2  # committed in an earlier step
    GIVEN = 3  # the prompt
    UNUSED = 4  # after the end of text


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """A canvas of n positions after one denoising step.

    tokens      each token's text with its spaces and newlines; "" where it is masked or unused
    state       int8 [n], values of State
    confidence  float32 [n], the probability that the network predicted for the token when it was committed; nan where
                there is none
    canvas      its number, from 0
    step        the denoising step of its canvas, from 1; 0 is before the first

    Raises ValueError where the three differ in length, or hold a value outside those above.
    """

    tokens: Sequence[str]
    state: np.ndarray
    confidence: np.ndarray
    canvas: int
    step: int

    def __post_init__(self):
        n = len(self.tokens)
        if np.shape(self.state) != (n,) or np.shape(self.confidence) != (n,):
            shapes = f"state {np.shape(self.state)}, confidence {np.shape(self.confidence)}"
            raise ValueError(f"a frame of {n} tokens has {shapes}: give each the shape ({n},)")
        if not np.isin(self.state, list(State)).all():
            raise ValueError(f"a frame's state holds {np.setdiff1d(self.state, list(State))}: use the values of State")
        known = self.confidence[~np.isnan(self.confidence)]
        if ((known < 0) | (known > 1)).any():
            raise ValueError("a frame's confidence lies outside 0..1: give probabilities, and nan where there is none")

    @property
    def committed(self) -> tuple[int, int]:
        """Positions committed so far, and all positions to commit."""
        count = np.bincount(self.state, minlength=len(State))
        done = int(count[State.JUST] + count[State.EARLIER])
        return done, done + int(count[State.MASKED])


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Frames of one row, in order. `meta` is shown beside them, for example the model, the sampler and the seed.

    Raises ValueError without a frame, or where frames differ in their number of positions.
    """

    title: str
    frames: Sequence[Frame]
    subtitle: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.frames:
            raise ValueError("a trace has no frames: give at least one")
        if len({len(frame.tokens) for frame in self.frames}) > 1:
            raise ValueError("a trace's frames differ in their number of positions: pad them to one width")

    def caption(self, frame: Frame) -> str:
        """A frame's canvas, denoising step and committed positions."""
        canvases = 1 + max(f.canvas for f in self.frames)
        steps = max(f.step for f in self.frames if f.canvas == frame.canvas)
        done, total = frame.committed
        canvas = f"canvas {frame.canvas + 1} of {canvases} · " if canvases > 1 else ""
        return f"{canvas}denoising step {frame.step} of {steps} · {done} of {total} committed"


def trace_from_history(
    history_tokens: np.ndarray,
    history_confidence: np.ndarray,
    *,
    prompt_length: int,
    length: int,
    mask: int,
    eos: int | None,
    texts: Callable[[list[int]], Sequence[str]],
    title: str,
    subtitle: str = "",
    meta: Mapping[str, Any] | None = None,
    canvas: np.ndarray | None = None,
) -> Trace:
    """S denoising steps of one row of n positions -> S + 1 frames, the first before any step.

    A token that is replaced by the mask is MASKED again; one that changes is JUST committed again.

    Args:
      history_tokens: int32 [S, n], the row after each step; `mask` where nothing is committed.
      history_confidence: float32 [S, n], used where a token appears or changes.
      prompt_length: positions 0 .. prompt_length - 1 are the prompt.
      length: positions from here on are unused in every frame; n if the whole row is used.
      mask: the mask's id.
      eos: the end of text's id, None if there is none; those in the prompt don't count.
      texts: ids -> the text of each by itself, with its spaces and newlines; never called with the mask.
      title, subtitle, meta: see `Trace`.
      canvas: int [S], the canvas of each step, from 0; None if there is only one.

    Raises:
      ValueError: if shapes or lengths don't fit, or the prompt holds a mask.
    """
    tokens, confidence = np.asarray(history_tokens), np.asarray(history_confidence, np.float32)
    canvas = np.zeros(len(tokens), int) if canvas is None else np.asarray(canvas)
    _check_history(tokens, confidence, canvas, prompt_length, length, mask)

    start = np.where(np.arange(tokens.shape[1]) < prompt_length, tokens[0], mask)
    tokens = np.concatenate([start[None], tokens])
    confidence = np.concatenate([np.full_like(confidence[:1], np.nan), confidence])
    state = _states(tokens, prompt_length, length, mask, eos)
    confidence = np.where(np.isin(state, (State.JUST, State.EARLIER)), _at_commit(tokens, confidence), np.nan)

    text = _texts(tokens[np.isin(state, (State.JUST, State.EARLIER, State.GIVEN))], eos, texts)
    hidden = np.isin(state, (State.MASKED, State.UNUSED))
    number = [0] + [int((canvas[: p + 1] == canvas[p]).sum()) for p in range(len(canvas))]
    frames = tuple(
        Frame(
            tokens=tuple("" if hide else text[int(token)] for token, hide in zip(tokens[p], hidden[p], strict=True)),
            state=state[p],
            confidence=confidence[p],
            canvas=int(canvas[max(p - 1, 0)]),
            step=number[p],
        )
        for p in range(len(tokens))
    )
    return Trace(title=title, frames=frames, subtitle=subtitle, meta=dict(meta or {}))


def _check_history(tokens, confidence, canvas, prompt_length, length, mask):
    if tokens.ndim != 2 or not tokens.size or tokens.shape != confidence.shape:
        shapes = f"tokens {tokens.shape}, confidence {confidence.shape}"
        raise ValueError(f"a history has {shapes}: give both as [steps, positions], for one row, not empty")
    if canvas.shape != tokens.shape[:1]:
        raise ValueError(f"canvas has shape {canvas.shape} for {len(tokens)} steps: give the canvas of each step")
    if not 0 <= prompt_length <= length <= tokens.shape[1]:
        raise ValueError(
            f"prompt_length {prompt_length} and length {length} don't fit {tokens.shape[1]} positions: "
            "0 <= prompt_length <= length <= positions"
        )
    if (tokens[:, :prompt_length] == mask).any() or (tokens[:, :prompt_length] != tokens[0, :prompt_length]).any():
        raise ValueError("the prompt holds a mask, or changes between steps: prompt_length is too large")


def _states(tokens, prompt_length, length, mask, eos):
    """int32 [S + 1, n], the start first -> State, int8 [S + 1, n]."""
    before = np.concatenate([tokens[:1], tokens[:-1]])
    at = np.arange(tokens.shape[1])
    state = np.where(tokens == mask, State.MASKED, np.where(tokens != before, State.JUST, State.EARLIER))
    state = np.where(at < prompt_length, State.GIVEN, state)
    ends = (tokens == eos) & (at >= prompt_length) if eos is not None else np.zeros(tokens.shape, bool)
    after_end = np.cumsum(ends, axis=1) - ends > 0
    return np.where(after_end | (at >= length), State.UNUSED, state).astype(np.int8)


def _at_commit(tokens, confidence):
    """Each position keeps the confidence of the step in which its token appeared."""
    kept = confidence.copy()
    for p in range(1, len(tokens)):
        kept[p] = np.where(tokens[p] != tokens[p - 1], confidence[p], kept[p - 1])
    return kept


def _texts(ids, eos, of):
    """{id: its text} for the ids that occur."""
    ids = [int(i) for i in np.unique(ids)]
    texts = list(of(ids))
    if len(texts) != len(ids):
        raise ValueError(f"texts returned {len(texts)} for {len(ids)} ids: it must return one for each")
    return {i: END_OF_TEXT if i == eos else text or EMPTY for i, text in zip(ids, texts, strict=True)}
