"""Planning tasks as training data: each row is a prompt, which is context, and an answer, which is predicted.

Examples are generated while training and never stored. Batch number n is a function of the seed and n alone, so a
resumed run continues with the same examples, and hosts that share a batch's rows generate together what one would.
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

from diffusion_lm.data import packing
from diffusion_lm.data.tokenizer import SentencePiece, Tokenizer
from diffusion_lm.layouts import Layout
from diffusion_lm.planning.tasks import base
from diffusion_lm.planning.tasks.base import Example, Task
from diffusion_lm.types import Batch

PREFETCH = 4  # batches that the thread, or each worker process, generates ahead
VALID_SEED = 0  # of the validation examples, whatever the run's seed


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A task as the `data` of a config (see `data.source.DataSource`).

    task     the task and its difficulty
    seq_len  positions of a row: at least `min_seq_len(task, layout)`
    test     a test file in the task's public format; nothing of it is trained on. None: the task's own test examples
    valid    validation examples, the first of the test file or of the task's own
    workers  processes that generate examples; 0: one thread does
    """

    task: Task
    seq_len: int
    test: str | None = None
    valid: int = 256
    workers: int = 0

    def __post_init__(self):
        if self.valid < 0 or self.workers < 0:
            raise ValueError(f"data.valid and data.workers must be at least 0; got {self.valid} and {self.workers}")

    @property
    def vocab_size(self) -> int:
        """Ids of the task's character tokenizer."""
        return len(set(self.task.alphabet)) + 3

    def open(
        self, layout: Layout, *, tokenizer: Tokenizer | None = None, fingerprint: str | None = None
    ) -> "TokenizedExamples":
        """Reads the test file, if any, and lays rows out for an objective.

        Args:
          layout: of the objective; decides where an answer begins in its row.
          tokenizer: the checkpoint's, where a run resumes; None makes a new one.
          fingerprint: of the task and test file that the checkpoint was trained with.

        Raises:
          ValueError: if seq_len is too small, the test file is not the task's, or the fingerprint differs.
          FileNotFoundError: if there is no test file.
        """
        needed = min_seq_len(self.task, layout)
        if self.seq_len < needed:
            raise ValueError(f"data.seq_len={self.seq_len} is too small for the longest example: set it to {needed}")
        task = self.task
        tests = base.test_examples(task, VALID_SEED, self.valid) if self.test is None else task.read(self.test)
        content = repr([task, *(tests if self.test else [])])
        found = TokenizedExamples(
            data=self,
            layout=layout,
            tokenizer=tokenizer or char_tokenizer(task.alphabet),
            tests=tuple(tests),
            fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
        )
        if fingerprint not in (None, found.fingerprint):
            raise ValueError(
                f"data.test={self.test} isn't the test file that the checkpoint kept out of training; use a new workdir"
            )
        return found


def char_tokenizer(alphabet: str) -> SentencePiece:
    """A token for each character, and SentencePiece's three: unknown, begin of text, end of text."""
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
    return SentencePiece(proto=model.getvalue())


def min_seq_len(task: Task, layout: Layout) -> int:
    """The least `Examples.seq_len` that holds every example of a task under a layout."""
    prompt, answer = task.max_lengths
    return layout.round_up(layout.answer_start(1 + prompt) + answer + 1)


@dataclass(frozen=True, kw_only=True)
class TokenizedExamples:
    """A task's examples as batches (see `data.source.TokenizedData`)."""

    data: Examples
    layout: Layout
    tokenizer: Tokenizer
    tests: tuple[Example, ...]
    fingerprint: str

    def train_batches(
        self, *, length: int, batch: int, seed: int, mine: Sequence[int] | None = None
    ) -> "GeneratedBatches":
        """Endless NumPy Batches [batch, length], or only their rows `mine`."""
        task, rows = self.data.task, self.rows(length)
        exclude = base.split_hashes(task, self.tests)
        mine = range(batch) if mine is None else mine
        return GeneratedBatches(functools.partial(_batch, task, rows, exclude, seed, batch, mine), self.data.workers)

    def valid_batches(self, *, length: int, batch: int) -> Iterator[Batch]:
        """NumPy Batches [batch, length] of the validation examples; empty rows fill the last."""
        rows, tests = self.rows(length), self.tests[: self.data.valid]
        for first in range(0, len(tests), batch):
            some = list(tests[first : first + batch])
            yield rows(some + [None] * (batch - len(some)))

    def rows(self, length: int) -> "ExampleRows":
        """Examples -> Batch [number of examples, length]."""
        alphabet = self.data.task.alphabet
        ids = tuple(int(self.tokenizer.encode(c)[0]) for c in alphabet)
        return ExampleRows(layout=self.layout, length=length, tokenizer=self.tokenizer, alphabet=alphabet, ids=ids)


@dataclass(frozen=True, kw_only=True)
class ExampleRows:
    """Examples, or None for empty rows -> Batch [number of examples, length]; `ids` are the alphabet's token ids."""

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
        # By a table, since a call of the tokenizer costs about as much as generating the example.
        encode = lambda text: self._table[np.frombuffer(text.encode("ascii"), np.uint8)]  # noqa: E731
        rows = [[] if one is None else [self.tokens(*map(encode, one))] for one in examples]
        return packing.pack(self.layout, rows, self.length, self.tokenizer)

    def tokens(self, prompt: np.ndarray, answer: np.ndarray) -> packing.Example:
        """Begin of text, prompt, answer and end of text; the last two are learned."""
        targets = np.arange(len(prompt) + len(answer) + 2) > len(prompt)
        tokens = np.concatenate([[self.tokenizer.bos], prompt, answer, [self.tokenizer.eos]]).astype(np.int32)
        return packing.Example(tokens, targets)


def _batch(task: Task, rows: ExampleRows, exclude, seed: int, batch: int, mine: Sequence[int], number: int) -> Batch:
    """The rows `mine` of batch `number`; at module level, so that worker processes can unpickle it."""
    return rows([base.example(task, seed, number * batch + row, exclude=exclude) for row in mine])


class GeneratedBatches:
    """Iterates over batches in order, generated ahead; its state is the number of the next one."""

    def __init__(self, generate: Callable[[int], Batch], workers: int):
        self._generate, self._workers = generate, workers
        self._next, self._pending, self._pool = 0, deque(), None

    def __iter__(self) -> "GeneratedBatches":
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            self._pool = _pool(self._workers)
        while len(self._pending) < PREFETCH * max(self._workers, 1):
            self._pending.append(self._pool.submit(self._generate, self._next + len(self._pending)))
        self._next += 1
        return self._pending.popleft().result()

    def get_state(self) -> dict[str, int]:
        """The state to resume from, as JSON values."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from get_state()'s result. ValueError for any other value."""
        if not isinstance(state, dict) or state.keys() != {"next_batch"}:
            raise ValueError(f"{state} doesn't say which batch of examples comes next: use a new workdir")
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self._next = state["next_batch"]


def _pool(workers: int) -> Executor:
    """One thread, or spawned processes: a fork of a process that runs JAX may hang."""
    if workers == 0:
        return ThreadPoolExecutor(1, thread_name_prefix="examples")
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
