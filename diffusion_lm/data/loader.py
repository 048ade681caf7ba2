"""From documents to batches: one flat array of tokens, rows cut from it, and Grain to shuffle and resume them.

The array reads  bos d1 eos [mask]*pad bos d2 eos [mask]*pad ...  . Rows of L positions overlap by one: a row's first
token is given, and is a target of the row before it, so that every text token and every end of text is a target of
exactly one row. The masks after an end of text mark where its canvas goes on: a Batch
repeats the end of text there.
"""

import contextlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import grain
import numpy as np
from absl import logging

from diffusion_lm.data.corpora import Corpus
from diffusion_lm.data.tokenizer import Tokenizer
from diffusion_lm.types import Batch

FORMAT = 1  # of the files that tokenize writes
NOWHERE = -1  # what a row holds after the end of the array, until it becomes a Batch
PROGRESS_SECONDS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenArray:
    """A tokenised corpus.

    flat       [N] uint16 or int32, in memory or mapped from a file
    bos, eos, mask   ids; bos and eos may be the same one
    documents  how many there are
    targets    text tokens and ends of text
    characters, bytes   of the text itself (bytes in UTF-8), for bits per character or byte
    unknown    text tokens that stand for text the tokenizer can't write
    """

    flat: np.ndarray = field(repr=False)
    bos: int
    eos: int
    mask: int
    documents: int
    targets: int
    characters: int
    bytes: int
    unknown: int


def tokenize(corpus: Corpus, tokenizer: Tokenizer, *, pad: int, path: str | Path | None = None) -> TokenArray:
    """Tokenises a corpus, one document in memory at a time; `pad` masks follow each end of text (a canvas less one).

    With a path NAME.npy the tokens are written there, atomically, and the counts to NAME.json beside it. If both are
    there and tell of the same corpus, tokenizer and pad, they are opened instead. Without one all is kept in memory.
    Documents without a single token are left out. ValueError if none is left, or for a negative pad.
    """
    if pad < 0:
        raise ValueError(f"pad {pad} is negative: it is the number of masks after an end of text")
    stream = _Stream(corpus, tokenizer, pad)
    if path is None:
        flat = np.concatenate([np.zeros(0, stream.dtype), *stream])
        return stream.array(flat)
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"tokens are written to a .npy file, not to {path}")
    told = {"format": FORMAT, "corpus": corpus.fingerprint(), "tokenizer": tokenizer.fingerprint, "pad": pad}
    if (counts := _told(path, told)) is not None:
        stream.counts.update(counts)
        return stream.array(np.load(path, mmap_mode="r"))
    return _write(path, stream, told)


class _Stream:
    """The pieces of the flat array, a document each, counted as they pass."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, pad: int):
        self.corpus, self.tokenizer, self.pad = corpus, tokenizer, pad
        self.dtype = np.dtype(np.uint16 if tokenizer.mask < 2**16 else np.int32)
        self.counts = Counter()

    def __iter__(self) -> Iterator[np.ndarray]:
        head, tail = [self.tokenizer.bos], [self.tokenizer.eos] + [self.tokenizer.mask] * self.pad
        for text in self.corpus.documents():
            ids = self.tokenizer.encode(text)
            if not len(ids):
                self.counts["empty"] += 1
                continue
            self.counts.update(documents=1, targets=len(ids) + 1, characters=len(text), bytes=len(text.encode()))
            self.counts["unknown"] += int(np.sum(ids == self.tokenizer.unknown))
            seen = self.counts["documents"], self.counts["targets"]
            logging.log_every_n_seconds(logging.INFO, "tokenizing: %d documents, %d tokens", PROGRESS_SECONDS, *seen)
            yield np.concatenate([head, ids, tail]).astype(self.dtype)
        self._report()

    def _report(self):
        if not self.counts["documents"]:
            raise ValueError("no document to tokenize: the corpus, or this part of it, is empty")
        if self.counts["empty"]:
            logging.warning("left out %d documents that have no token", self.counts["empty"])
        if self.counts["unknown"]:
            said = "the tokenizer can't write %d tokens' text, which is lost: train one with byte_fallback"
            logging.warning(said, self.counts["unknown"])

    def array(self, flat: np.ndarray) -> TokenArray:
        names = ("documents", "targets", "characters", "bytes", "unknown")
        ids = {name: getattr(self.tokenizer, name) for name in ("bos", "eos", "mask")}
        return TokenArray(flat=flat, **ids, **{name: self.counts[name] for name in names})


def _told(path: Path, told: dict) -> dict[str, int] | None:
    """The counts beside `path`, if they go with what is `told` and with the size of the array."""
    sidecar = path.with_suffix(".json")
    if not (path.exists() and sidecar.exists()):
        return None
    try:
        known = json.loads(sidecar.read_text())
        length, counts = known.pop("length"), known.pop("counts")
        if known == told and length == np.load(path, mmap_mode="r").size:
            return counts
        logging.info("%s is of another corpus, tokenizer or pad: writing it anew", path)
    except (ValueError, KeyError) as error:
        logging.warning("%s or what tells of it is damaged: writing it anew (%s)", path, error)
    return None


def _write(path: Path, stream: _Stream, told: dict) -> TokenArray:
    sidecar = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar.unlink(missing_ok=True)  # so that it never tells of other tokens than those beside it
    with _replacing(path) as file:
        length = _write_npy(file, stream)
    with _replacing(sidecar) as file:
        file.write(json.dumps(told | {"length": length, "counts": stream.counts}, indent=1).encode())
    return stream.array(np.load(path, mmap_mode="r"))


def _write_npy(file: IO[bytes], stream: _Stream) -> int:
    """Writes a .npy whose length is known only at its end. NumPy pads the header so that it can be written again."""

    def header(length: int) -> int:
        file.seek(0)
        shape = {"descr": np.lib.format.dtype_to_descr(stream.dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, shape)
        return file.tell()

    length, start = 0, header(0)
    for tokens in stream:
        file.write(tokens.tobytes())
        length += len(tokens)
    if header(length) != start:
        raise RuntimeError("this NumPy's .npy headers grow with the length of the array")
    return length


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when all is written, and leaves nothing behind if that fails."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # hosts may write the same path at once
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """The grid of rows: row i is flat[i * (L - 1) : i * (L - 1) + L], NOWHERE after its end."""

    tokens: TokenArray
    length: int

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(f"rows of {self.length} tokens have no target: set data.seq_len to 2 or more")

    def __len__(self) -> int:
        return -(-(len(self.tokens.flat) - 1) // (self.length - 1))

    def __getitem__(self, i: int) -> np.ndarray:
        """int32 [L]."""
        return self._at(i * (self.length - 1))

    def near(self, i: int, rng: np.random.Generator) -> np.ndarray:
        """int32 [L]: a row that starts anywhere from row i's start to row i + 1's, but never runs over the end."""
        start = i * (self.length - 1) + int(rng.integers(self.length - 1))
        return self._at(min(start, len(self.tokens.flat) - self.length))

    def _at(self, start: int) -> np.ndarray:
        row = np.full(self.length, NOWHERE, np.int32)
        found = self.tokens.flat[start : start + self.length]
        row[: len(found)] = found
        return row

    def batch(self, rows: np.ndarray) -> Batch:
        """NumPy Batch of rows [B, L]. A row that starts inside a document calls it segment 1; padding at a row's start,
        whose text is out of sight, belongs to none."""
        exists, mask = rows != NOWHERE, self.tokens.mask
        tokens = np.where(exists, rows, mask).astype(np.int32)
        text = tokens != mask
        start = tokens == self.tokens.bos
        # where bos and eos are the same piece, it is a begin of text only after another end or its noise
        start[:, 1:] &= (tokens[:, :-1] == self.tokens.eos) | (tokens[:, :-1] == mask)
        given = start.copy()
        given[:, 0] |= text[:, 0]
        index = np.arange(self.length, dtype=np.int32)
        first = np.maximum.accumulate(np.where(start, index, 0), axis=1)
        segment_ids = np.cumsum(start, axis=1, dtype=np.int32) + ~start[:, :1]
        exists &= np.maximum.accumulate(text, axis=1)
        return Batch(
            tokens=np.where(exists & ~text, self.tokens.eos, tokens).astype(np.int32),
            segment_ids=np.where(exists, segment_ids, 0).astype(np.int32),
            positions=np.where(exists, index - first, 0).astype(np.int32),
            context_mask=given,
            loss_mask=text & ~given,
        )


def train_loader(
    tokens: TokenArray, *, length: int, batch: int, seed: int, mine: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Endless NumPy Batches [batch, length], or of those of their rows that are `mine` (0 to batch - 1).

    Each epoch takes one random window near every row of the grid, in a new order. Which rows make a batch doesn't
    depend on how hosts share them out. The iterator's get_state() is JSON, the same for any share, and set_state()
    goes on from there to the same batches.

    ValueError if the tokens don't fill a row, or all rows a batch, or a row that is mine isn't one of a batch.
    """
    rows = PackedRows(tokens=tokens, length=length)
    if len(tokens.flat) < length:
        raise ValueError(
            f"{len(tokens.flat)} tokens don't fill a row of {length}: "
            f"set data.seq_len to at most {len(tokens.flat)}, or give more text"
        )
    if not 1 <= batch <= len(rows):
        raise ValueError(
            f"a batch of {batch} rows can't be made from {len(rows)} rows of {length}: "
            "set the batch, or data.seq_len, lower"
        )
    mine = range(batch) if mine is None else mine
    if not all(0 <= row < batch for row in mine):
        raise ValueError(f"rows {list(mine)} are not rows of a batch of {batch}")
    endless = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat().random_map(rows.near)

    def share(number: int) -> Batch:
        return rows.batch(np.stack([endless[number * batch + row] for row in mine]))

    batches = grain.MapDataset.range(len(endless) // batch).map(share)
    # a thread reads ahead, so that no step waits for a disk
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(tokens: TokenArray, *, length: int, batch: int) -> Iterator[Batch]:
    """NumPy Batches [batch, length] in order, each target in exactly one of them; empty rows (segment 0) fill the last.

    ValueError for a batch below 1 or a length below 2.
    """
    if batch < 1:
        raise ValueError(f"a batch of {batch} rows is none: set it to 1 or more")
    rows = PackedRows(tokens=tokens, length=length)
    return (_eval_batch(rows, first, batch) for first in range(0, len(rows), batch))


def _eval_batch(rows: PackedRows, first: int, batch: int) -> Batch:
    found = [rows[i] for i in range(first, first + batch)]  # a row after the last is empty
    return rows.batch(np.stack(found))
