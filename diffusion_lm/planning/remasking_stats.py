"""Second thoughts: how often a committed token was taken back, and whether that helped."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_lm.samplers.base import Generation


class TakeBacks(NamedTuple):
    """What became of positions, from the first token each was given to its last one.

    positions  that were given a token at all
    times      how often a standing token was masked again or exchanged; a position may count several times
    mended     positions that were wrong at first and right in the end
    spoiled    right at first, wrong in the end
    other      wrong at first, and wrong in another way in the end
    wrong      wrong at first, whatever came of them
    doubted    of those, taken back at least once

    So mended less spoiled is what second thoughts added to the positions that are right, and doubted of wrong how often
    a wrong commit was taken back.
    """

    positions: int
    times: int
    mended: int
    spoiled: int
    other: int
    wrong: int
    doubted: int

    def __add__(self, more: "TakeBacks") -> "TakeBacks":
        return TakeBacks(*(a + b for a, b in zip(self, more, strict=True)))


def take_backs(frames: np.ndarray, right: np.ndarray, mask: int) -> TakeBacks:
    """frames int [rows, passes, n], the text after each pass, `mask` where nothing stands; right int [rows, n], what
    should stand there, `mask` where it doesn't matter. ValueError where their shapes don't fit."""
    frames, right = np.asarray(frames), np.asarray(right)
    if frames.ndim != 3 or right.shape != (frames.shape[0], frames.shape[2]):
        raise ValueError(f"frames {frames.shape} and right {right.shape}: give [rows, passes, n] and [rows, n]")
    stands = frames != mask
    counted = stands.any(axis=1) & (right != mask)
    first = np.take_along_axis(frames, stands.argmax(axis=1)[:, None], axis=1)[:, 0]
    last = frames[:, -1]
    left = (stands[:, :-1] & (frames[:, 1:] != frames[:, :-1])).sum(axis=1)
    was, is_ = first == right, last == right
    outcomes = (~was & is_, was & ~is_, ~was & ~is_ & (first != last), ~was, ~was & (left > 0))
    return TakeBacks(int(counted.sum()), int(left[counted].sum()), *(int((o & counted).sum()) for o in outcomes))


def recorded(generation: Generation, prompts: Sequence[np.ndarray], length: int, mask: int) -> np.ndarray:
    """int32 [rows, passes, length]: what stood behind each prompt after each pass, of all canvases one after the other.

    prompts  the rows' token ids. ValueError if the generation wasn't recorded
    """
    history = generation.history
    if history is None:
        raise ValueError("no history: let the writer record its passes")
    made, start, tokens = (np.asarray(a) for a in (history.made, history.start, history.tokens))
    frames = np.full((len(prompts), max(int(made.sum()), 1), length), mask, np.int32)
    for row, prompt in enumerate(prompts):
        text, at = np.full(start[:, row].max() + tokens.shape[-1] + len(prompt) + length, mask, np.int32), 0
        for canvas, passes in enumerate(made):
            for p in range(passes):
                text[start[canvas, row] :][: tokens.shape[-1]] = tokens[canvas, p, row]
                frames[row, at] = text[len(prompt) :][:length]
                at += 1
    return frames
