"""From a task to batches: each row is a prompt, which is given, and an answer with its end of text, which are targets.

Examples are drawn as training goes and never stored: batch number n is a function of the seed and n. So a run that
resumes draws what it would have drawn, and hosts that share its rows out draw together what one would draw alone.
"""

import functools
import hashlib
import io
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import sentencepiece

from diffusion_lm.data.tokenizer import Tokenizer
from diffusion_lm.planning.tasks import base
from diffusion_lm.planning.tasks.base import Example, Task
from diffusion_lm.types import Batch, Causal, Objective

AHEAD = 4  # batches that a thread, or each worker, draws before they are asked for
VALID_SEED = 0  # of the examples looked at while training, whatever the run's seed


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A task in the place of a text, as `data` of a config.

    length   positions of a row: at least `width(task, objective)`
    test     a file in the public format: nothing of it is trained on. None: only the task's own tests are kept apart
    valid    examples of the test file, or of the task's own tests, to look at while training
    workers  processes that draw examples; 0: a thread does
    """

    task: Task
    seq_len: int
    test: str | None = None
    valid: int = 256
    workers: int = 0

    def __post_init__(self):
        if self.valid < 0 or self.workers < 0:
            raise ValueError(f"data.valid={self.valid} and data.workers={self.workers} can't be negative")


def char_tokenizer(alphabet: str) -> Tokenizer:
    """A piece for each character, and the three that every tokenizer has: unknown, begin and end of text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(set(alphabet))),
        model_writer=model,
        model_type="char",
        vocab_size=len(set(alphabet)) + 3,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return Tokenizer(proto=model.getvalue())


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an objective wants its rows.

    canvas   positions that are denoised together: 0 the whole row, 1 for autoregression
    aligned  answers begin with a canvas, as a sampler begins them behind a prompt that it has read causally; else rows
             begin with their prompt, and so do the sampler's blocks
    """

    canvas: int
    aligned: bool

    def width(self, prompt: int, answer: int) -> int:
        """Positions for a prompt and an answer of so many characters, begin and end of text included."""
        stop = self._answer(prompt) + answer + 1
        return _up(stop, self.canvas or 1)

    def batch(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], length: int, tokenizer: Tokenizer) -> Batch:
        """NumPy Batch [rows, length] of (prompt, answer) ids; None in place of a pair makes an empty row.

        What follows an end of text repeats it up to its canvas's end (see `types.Batch`), and belongs to no document
        beyond that, nor does what comes before a prompt.
        """
        tokens = np.full((len(rows), length), tokenizer.mask, np.int32)
        segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
        given, target = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        for i, row in enumerate(rows):
            if row is None:
                continue
            prompt, answer = row
            first = self._answer(len(prompt))
            start, stop = first - len(prompt) - 1, first + len(answer) + 1
            end = _up(stop, self.canvas) if self.canvas else length
            tokens[i, start:end] = np.concatenate([[tokenizer.bos], prompt, answer, [tokenizer.eos] * (end - stop + 1)])
            segment_ids[i, start:end] = 1
            positions[i, start:end] = np.arange(end - start)
            given[i, start:first], target[i, first:stop] = True, True
        return Batch(tokens=tokens, segment_ids=segment_ids, positions=positions, context_mask=given, loss_mask=target)

    def _answer(self, prompt: int) -> int:
        """Where the answer to a prompt of so many characters begins."""
        return _up(1 + prompt, self.canvas) if self.aligned else 1 + prompt


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def layout(objective: Objective) -> Layout:
    """The layout that an objective trains, and that its sampler meets again."""
    return Layout(canvas=objective.canvas, aligned=objective.canvas > 1 and isinstance(objective.prefix, Causal))


def width(task: Task, objective: Objective) -> int:
    """Positions that hold any example of a task under an objective: the least `Examples.length`."""
    return layout(objective).width(*task.longest)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A task, tokenised: what a run reads in the place of a corpus."""

    data: Examples
    layout: Layout
    tokenizer: Tokenizer
    tests: tuple[Example, ...]
    fingerprint: str

    def train_batches(self, *, length: int, batch: int, seed: int, mine: Sequence[int] | None = None) -> "Drawn":
        """Endless NumPy Batches [batch, length], or of those of their rows that are `mine`: `loader.train_loader`."""
        task, rows = self.data.task, self.rows(length)
        avoid = base.keys(task, self.tests)
        draw = functools.partial(_draw, task, rows, avoid, seed, batch, range(batch) if mine is None else mine)
        return Drawn(draw, self.data.workers)

    def valid_batches(self, *, length: int, batch: int) -> Iterator[Batch]:
        """NumPy Batches [batch, length] of the tests; empty rows fill the last."""
        rows, tests = self.rows(length), self.tests[: self.data.valid]
        for first in range(0, len(tests), batch):
            some = list(tests[first : first + batch])
            yield rows(some + [None] * (batch - len(some)))

    def rows(self, length: int) -> "ExampleRows":
        """Examples -> Batch [.., length]."""
        alphabet = self.data.task.alphabet
        ids = tuple(int(self.tokenizer.encode(c)[0]) for c in alphabet)
        return ExampleRows(layout=self.layout, length=length, tokenizer=self.tokenizer, alphabet=alphabet, ids=ids)


@dataclass(frozen=True, kw_only=True)
class ExampleRows:
    """Examples, or None for empty rows, -> Batch [.., length]; `ids` are the alphabet's pieces."""

    layout: Layout
    length: int
    tokenizer: Tokenizer
    alphabet: str
    ids: tuple[int, ...]

    @functools.cached_property
    def _table(self) -> np.ndarray:
        table = np.full(128, self.tokenizer.unknown, np.int32)
        table[[ord(c) for c in self.alphabet]] = self.ids
        return table

    def __call__(self, examples: Sequence[Example | None]) -> Batch:
        pairs = [example and tuple(map(self._encoded, example)) for example in examples]
        return self.layout.batch(pairs, self.length, self.tokenizer)

    def _encoded(self, text: str) -> np.ndarray:
        """What tokenizer.encode gives, without its price of a call."""
        return self._table[np.frombuffer(text.encode("ascii"), np.uint8)]


def source(data: Examples, objective: Objective, tokenizer: Tokenizer | None = None) -> Source:
    """Reads the test file, if any. The tokenizer is the checkpoint's, or a new one.

    ValueError for rows that are too short, FileNotFoundError or ValueError for the test file.
    """
    needed = width(data.task, objective)
    if data.seq_len < needed:
        raise ValueError(f"rows of data.seq_len={data.seq_len} can't hold every example: set it to {needed}")
    task = data.task
    tests = base.test_examples(task, VALID_SEED, data.valid) if data.test is None else task.read(data.test)
    said = repr([task, *(tests if data.test else [])])
    return Source(
        data=data,
        layout=layout(objective),
        tokenizer=tokenizer or char_tokenizer(task.alphabet),
        tests=tuple(tests),
        fingerprint=hashlib.sha256(said.encode()).hexdigest()[:16],
    )


def _draw(task: Task, rows: ExampleRows, avoid, seed: int, batch: int, mine: Sequence[int], number: int) -> Batch:
    """Rows of batch `number`."""
    return rows([base.example(task, seed, number * batch + row, avoid=avoid) for row in mine])


class Drawn:
    """Batches drawn ahead of their use, in order; the state is the number of the next."""

    def __init__(self, draw: Callable[[int], Batch], workers: int):
        self._draw, self._workers = draw, workers
        self._next, self._coming, self._pool = 0, deque(), None

    def __iter__(self) -> "Drawn":
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            self._pool = _pool(self._workers)
        while len(self._coming) < AHEAD * max(self._workers, 1):
            self._coming.append(self._pool.submit(self._draw, self._next + len(self._coming)))
        self._next += 1
        return self._coming.popleft().result()

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """ValueError for a state that isn't one of this class's."""
        if not isinstance(state, dict) or state.keys() != {"next_batch"}:
            raise ValueError(f"{state} doesn't say which batch of examples comes next: use a new workdir")
        for future in self._coming:
            future.cancel()
        self._coming.clear()
        self._next = state["next_batch"]


def _pool(workers: int) -> Executor:
    """A thread, or processes that are started afresh: a fork of a process that runs JAX may hang."""
    if workers == 0:
        return ThreadPoolExecutor(1, thread_name_prefix="examples")
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
