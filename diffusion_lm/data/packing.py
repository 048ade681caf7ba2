"""Rows of contexts and answers: examples side by side in a row, each a document of its own.

A sampler later meets the same arrangement. After an answer its end of text repeats to the end of its canvas (see
`types.Batch`). Positions beyond that, and before a context whose answer begins with a canvas, belong to no document.
"""

import bisect
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_lm.data.tokenizer import Tokenizer
from diffusion_lm.layouts import Layout
from diffusion_lm.types import Batch


class Example(NamedTuple):
    """A text of which some tokens are learned.

    tokens   int32 [n]
    targets  bool [n], the answers; the first token isn't one. Where an objective denoises, they are the text's end
    """

    tokens: np.ndarray
    targets: np.ndarray


class Placed(NamedTuple):
    """An example as it lies in a row that begins with it.

    example  as much of it as the row holds
    start    its first position
    end      the position after the last end of text that fills its last canvas
    """

    example: Example
    start: int
    end: int


def place(example: Example, layout: Layout, length: int, stops: Collection[int]) -> Placed | None:
    """Where an example lies in an empty row of `length` positions; None where nothing of its answer has room.

    An answer without one of the `stops` at its end goes on, or is cut here. Canvases that it doesn't fill are left out,
    since nobody knows what follows.
    """
    context = int(np.argmax(example.targets))
    start = layout.answer_start(context) - context
    tokens = example.tokens[: max(length - start, 0)]
    stop = start + len(tokens)
    if len(tokens) and tokens[-1] in stops:
        end = layout.canvas_end(stop, length)
    else:
        stop = end = max(layout.round_up(stop - layout.pad), start)
    kept = Example(*(array[: stop - start] for array in example))
    return Placed(kept, start, end) if kept.targets.any() else None


def groups(sizes: Sequence[int], layout: Layout, length: int) -> list[list[int]]:
    """Which examples share a row: for each row their numbers. The largest are placed first, each where least is left.

    Args:
      sizes: positions of each, `Placed.end`.
      layout: of the objective. A whole row is one canvas and holds one example.
      length: positions of a row.
    """
    if not layout.align:
        return [[i] for i in range(len(sizes))]
    rows, free = [], []  # free: (positions that are left, row), sorted
    for i in np.argsort(-np.asarray(sizes, int), kind="stable"):
        at = bisect.bisect_left(free, (sizes[i], 0))
        left, row = free.pop(at) if at < len(free) else (length, len(rows))
        rows += [[]] if row == len(rows) else []
        rows[row].append(int(i))
        bisect.insort(free, (left - sizes[i], row))
    return rows


def pack(layout: Layout, rows: Sequence[Sequence[Example]], length: int, tokenizer: Tokenizer) -> Batch:
    """NumPy Batch [rows, length] of rows of examples, as `groups` puts them together; a row may be empty.

    Raises ValueError if a row's examples don't fit into it.
    """
    tokens = np.full((len(rows), length), tokenizer.mask, np.int32)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    context, loss = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        begin = 0
        for number, example in enumerate(row, 1):
            placed = place(example, layout, length, tokenizer.stops)
            if placed is None or begin + placed.end > length:
                raise ValueError(f"{len(row)} examples don't fit into a row of {length} positions")
            count = len(placed.example.tokens)
            here = slice(begin + placed.start, begin + placed.end)
            written = slice(here.start, here.start + count)
            tokens[i, here], segment_ids[i, here] = tokenizer.eos, number
            positions[i, here] = np.arange(here.stop - here.start)
            tokens[i, written], loss[i, written] = placed.example
            context[i, written] = ~placed.example.targets
            begin = here.stop
    return Batch(tokens=tokens, segment_ids=segment_ids, positions=positions, context_mask=context, loss_mask=loss)
