"""How often a sampler changed a committed token, and whether that made it correct."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_lm.samplers.base import Generation


class RemaskingStats(NamedTuple):
    """Counts of positions, comparing the first token committed at each with its last.

    positions       that a token was ever committed at
    changes         times a committed token was masked again or replaced; a position may count several times
    corrected       positions that were wrong first and correct last
    broken          correct first, wrong last
    still_wrong     wrong first, and wrong last with another token
    first_wrong     wrong first, whatever came last
    wrong_remasked  of first_wrong, those that were changed at least once

    corrected - broken is what changing tokens added to the correct positions. wrong_remasked / first_wrong is the share
    of wrong commits that the sampler changed.
    """

    positions: int
    changes: int
    corrected: int
    broken: int
    still_wrong: int
    first_wrong: int
    wrong_remasked: int

    def __add__(self, other: "RemaskingStats") -> "RemaskingStats":
        return RemaskingStats(*(a + b for a, b in zip(self, other, strict=True)))


def remasking_stats(frames: np.ndarray, right: np.ndarray, mask: int) -> RemaskingStats:
    """Counts changes of committed tokens.

    Args:
      frames: int [rows, steps, n], the tokens after each denoising step; `mask` where none is committed.
      right: int [rows, n], the correct tokens; `mask` at positions that don't count.
      mask: the mask's id.

    Raises:
      ValueError: if the shapes don't fit.
    """
    frames, right = np.asarray(frames), np.asarray(right)
    if frames.ndim != 3 or right.shape != (frames.shape[0], frames.shape[2]):
        raise ValueError(f"frames {frames.shape} and right {right.shape}: give [rows, steps, n] and [rows, n]")
    committed = frames != mask
    counted = committed.any(axis=1) & (right != mask)
    first = np.take_along_axis(frames, committed.argmax(axis=1)[:, None], axis=1)[:, 0]
    last = frames[:, -1]
    changes = (committed[:, :-1] & (frames[:, 1:] != frames[:, :-1])).sum(axis=1)
    was, is_ = first == right, last == right
    outcomes = (~was & is_, was & ~is_, ~was & ~is_ & (first != last), ~was, ~was & (changes > 0))
    return RemaskingStats(
        int(counted.sum()), int(changes[counted].sum()), *(int((o & counted).sum()) for o in outcomes)
    )


def answer_history(generation: Generation, prompts: Sequence[np.ndarray], length: int, mask: int) -> np.ndarray:
    """The tokens after each prompt after each denoising step, over all canvases in a row.

    Args:
      generation: with a history.
      prompts: token ids of each row's prompt.
      length: positions of an answer.
      mask: the mask's id.

    Returns:
      int32 [rows, steps, length].

    Raises:
      ValueError: if the generation has no history.
    """
    history = generation.history
    if history is None:
        raise ValueError("the generation has no history: set record=True on the sampler")
    made, start, tokens = (np.asarray(a) for a in (history.steps, history.start, history.tokens))
    frames = np.full((len(prompts), max(int(made.sum()), 1), length), mask, np.int32)
    for row, prompt in enumerate(prompts):
        text, at = np.full(start[:, row].max() + tokens.shape[-1] + len(prompt) + length, mask, np.int32), 0
        for canvas, steps in enumerate(made):
            for step in range(steps):
                text[start[canvas, row] :][: tokens.shape[-1]] = tokens[canvas, step, row]
                frames[row, at] = text[len(prompt) :][:length]
                at += 1
    return frames
