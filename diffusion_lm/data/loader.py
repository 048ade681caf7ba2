"""From documents to batches: one flat array of tokens, rows cut from it, and Grain to shuffle and resume them.

The array is  bos d1 eos [mask]*pad bos d2 eos [mask]*pad ...  . Rows of L positions overlap by one: a row's first
token is context, and a target of the row before it. So every text token and every end of text is a target of exactly
one row. The masks after an end of text are the rest of its canvas: a Batch repeats the end of text there.
"""

import contextlib
import json
import mmap
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grain
import numpy as np
from absl import logging

from diffusion_lm import files, lock
from diffusion_lm.data.corpora import Corpus, document_parts
from diffusion_lm.data.text_parts import sliced
from diffusion_lm.data.tokenizer import Tokenizer, encode_parts, first_difference, lossless, spelled
from diffusion_lm.progress import Progress
from diffusion_lm.types import Batch

FORMAT = 3  # of the files that `tokenize` writes
NOWHERE = -1  # marks positions of a row after the end of the array, until it becomes a Batch
BLOCK = 1 << 21  # bytes of tokens at a time, until their number is known
CHECKED_TOKENS = 1 << 24  # read at a time to see whether a file is what was written


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenArray:
    """A tokenised corpus.

    flat       [N] uint16 or int32, in memory or mapped from a file
    bos, eos, mask   ids; bos and eos may be the same id
    documents  their number
    targets    text tokens and ends of text
    characters, bytes   of the text that the tokens spell (bytes in UTF-8), for bits per character or byte
    unknown    tokens that stand for text without a token of its own
    changed    documents that the tokenizer doesn't give back unchanged
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
    changed: int = 0


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, *, pad: int, path: str | Path | None = None, name: str = "the text"
) -> TokenArray:
    """Tokenises a corpus, part by part where corpus and tokenizer have parts, else with one document in memory.

    Args:
      corpus: documents. Those without a single token are left out.
      tokenizer: maps text to ids.
      pad: the number of masks after each end of text: a canvas less one.
      path: NAME.npy, a file to keep the tokens in, with the counts in NAME.json beside it; both are written
        atomically. If they are there, of the same corpus, tokenizer and pad, they are opened. None: memory.
      name: what log messages call the corpus.

    Raises ValueError if no document is left, or for a negative pad.
    """
    if pad < 0:
        raise ValueError(f"pad {pad} is negative: it is the number of masks after an end of text")
    stream = _Stream(corpus, tokenizer, pad, name)
    if path is None:
        return stream.array(_joined(stream, stream.dtype))
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"tokens are written to a .npy file, not to {path}")
    key = {"format": FORMAT, "corpus": corpus.fingerprint(), "tokenizer": tokenizer.fingerprint, "pad": pad}
    if (kept := _kept(path, key)) is None:
        with lock.hold(path.with_suffix(".lock"), wait=True):
            if (kept := _kept(path, key)) is None:  # nor has another run written them meanwhile
                return _write(path, stream, key)
    flat, counts = kept
    stream.counts.update(counts)
    return stream.array(flat)


def _joined(arrays: Iterable[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Arrays of a dtype, one behind the other. The memory of what was copied goes back at once, as a heap's may not."""
    blocks = []
    for array in arrays:
        data = array.data.cast("B")
        while data:
            if not blocks or blocks[-1].tell() == BLOCK:
                blocks.append(mmap.mmap(-1, BLOCK))
            written = min(BLOCK - blocks[-1].tell(), len(data))
            blocks[-1].write(data[:written])
            data = data[written:]
    joined, end = np.empty(sum(block.tell() for block in blocks), np.uint8), 0
    for block in blocks:
        with block:
            begin, end = end, end + block.tell()
            joined[begin:end] = np.frombuffer(block[: block.tell()], np.uint8)
    return joined.view(dtype)


class _Stream:
    """The documents' parts of the flat array, counted as they pass."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, pad: int, name: str):
        self.corpus, self.tokenizer, self.pad, self.name = corpus, tokenizer, pad, name
        self.dtype = np.dtype(np.uint16 if max(tokenizer.mask, tokenizer.vocab - 1) < 2**16 else np.int32)
        self.counts, self.example = Counter(), None

    def __iter__(self) -> Iterator[np.ndarray]:
        head = np.array([self.tokenizer.bos], self.dtype)
        tail = np.array([self.tokenizer.eos] + [self.tokenizer.mask] * self.pad, self.dtype)
        progress = Progress()
        exact = lossless(self.tokenizer)
        for parts in document_parts(self.corpus):
            found, size = 0, Counter()
            # the whole text, where it must be compared with what its ids spell
            parts = _counted(parts, size) if exact else [text := "".join(parts)]
            for ids in filter(len, encode_parts(self.tokenizer, parts)):
                if not found:
                    yield head
                yield ids.astype(self.dtype)
                found += len(ids)
                self.counts["unknown"] += int(np.sum(ids == self.tokenizer.unknown))
                if progress.due():
                    seen = self.counts["documents"] + 1, self.counts["targets"] + found
                    logging.info("tokenizing %s: %d documents, %d tokens so far", self.name, *seen)
            if not found:
                self.counts["empty"] += 1
                continue
            if not exact:
                size = self._left(text, ids)
            self.counts.update(size, targets=found + 1, documents=1)
            yield tail
        self._report()

    def _left(self, text: str, ids: np.ndarray) -> Counter:
        """The size of what is left of a text that the tokenizer may change."""
        left, size = spelled(self.tokenizer, text, ids), Counter()
        if left != text:
            self.counts["changed"] += 1
            self.example = self.example or first_difference(text, left)
        for _ in _counted(sliced(left), size):
            pass
        return size

    def _report(self):
        counts = self.counts
        if not counts["documents"]:
            raise ValueError("no document to tokenize: the corpus, or this part of it, is empty")
        logging.info(
            "tokenized %s: %d documents, %d tokens, %d bytes",
            *(self.name, counts["documents"], counts["targets"], counts["bytes"]),
        )
        if counts["empty"]:
            logging.warning("%s: left out %d documents that have no token", self.name, counts["empty"])
        if counts["unknown"]:
            hint = "train a tokenizer with byte_fallback to keep it"
            logging.warning("%s: text without a token is lost at %d places: %s", self.name, counts["unknown"], hint)
        if counts["changed"]:
            hint = "bits per byte count the text that is left"
            message = "%s: the tokenizer changes %d of %d documents (such as %r to %r): %s"
            logging.warning(message, self.name, counts["changed"], counts["documents"], *self.example, hint)

    def array(self, flat: np.ndarray) -> TokenArray:
        names = ("documents", "targets", "characters", "bytes", "unknown", "changed")
        ids = {name: getattr(self.tokenizer, name) for name in ("bos", "eos", "mask")}
        return TokenArray(flat=flat, **ids, **{name: self.counts[name] for name in names})


def _counted(parts: Iterable[str], size: Counter) -> Iterator[str]:
    """The parts of a text, counted as they pass: characters, and bytes in UTF-8."""
    for part in parts:
        size["characters"] += len(part)
        size["bytes"] += len(part) if part.isascii() else len(part.encode())
        yield part


def _kept(path: Path, key: dict) -> tuple[np.ndarray, dict[str, int]] | None:
    """The array at `path` and the counts beside it, if they were written for `key` and nothing has changed since."""
    sidecar = path.with_suffix(".json")
    if not (path.exists() and sidecar.exists()):
        return None
    try:
        flat = np.load(path, mmap_mode="r")  # before the file beside it: a run that replaces both deletes that first
        known = dict(json.loads(sidecar.read_text()))
        length, checksum, counts = (known.pop(name, None) for name in ("length", "checksum", "counts"))
        if known != key:
            logging.info("%s is of another corpus, tokenizer or pad: writing it anew", path)
        elif length != flat.size or checksum != _checksum(flat):
            raise ValueError("its tokens are not those that were written")
        else:
            return flat, counts
    except (ValueError, TypeError, EOFError, FileNotFoundError) as error:
        logging.warning("%s or its .json is damaged: writing it anew (%s)", path, error)
    return None


def _checksum(flat: np.ndarray) -> int:
    total = 0
    for start in range(0, flat.size, CHECKED_TOKENS):
        total = zlib.crc32(np.ascontiguousarray(flat[start : start + CHECKED_TOKENS]), total)
    return total


def _write(path: Path, stream: _Stream, key: dict) -> TokenArray:
    sidecar = path.with_suffix(".json")
    sidecar.unlink(missing_ok=True)  # so that it never describes other tokens than those beside it
    with _replacing(path) as file:
        length, checksum = _write_npy(file, stream)
    with _replacing(sidecar) as file:
        whole = key | {"length": length, "checksum": checksum, "counts": stream.counts}
        file.write(json.dumps(whole, indent=1).encode())
    return stream.array(np.load(path, mmap_mode="r"))


def _write_npy(file: IO[bytes], stream: _Stream) -> tuple[int, int]:
    """Writes a .npy whose length is known only at its end. NumPy pads the header, so that it can be rewritten. Returns
    the length and the checksum."""

    def header(length: int) -> int:
        file.seek(0)
        shape = {"descr": np.lib.format.dtype_to_descr(stream.dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, shape)
        return file.tell()

    length, checksum, start = 0, 0, header(0)
    for tokens in stream:
        file.write(tokens.tobytes())
        length, checksum = length + len(tokens), zlib.crc32(tokens, checksum)
    if header(length) != start:
        raise RuntimeError("this NumPy's .npy headers grow with the length of the array")
    return length, checksum


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that replaces `path` once it is whole; a failure leaves nothing."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # hosts may write the same path at once
    try:
        with files.named(path):
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
        """int32 [L]: a row that starts at random between row i and row i + 1, and never runs over the end."""
        start = i * (self.length - 1) + int(rng.integers(self.length - 1))
        return self._at(min(start, len(self.tokens.flat) - self.length))

    def _at(self, start: int) -> np.ndarray:
        row = np.full(self.length, NOWHERE, np.int32)
        found = self.tokens.flat[start : start + self.length]
        row[: len(found)] = found
        return row

    def batch(self, rows: np.ndarray) -> Batch:
        """NumPy Batch of rows [B, L]. A document that began in an earlier row is segment 1. Padding at a row's start
        has no segment: its document isn't in the row."""
        exists, mask = rows != NOWHERE, self.tokens.mask
        tokens = np.where(exists, rows, mask).astype(np.int32)
        text = tokens != mask
        start = tokens == self.tokens.bos
        # if bos and eos are the same id, it begins a text only after an end of text or its padding
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
    """Endless NumPy Batches for training.

    Each epoch takes one random window near every row of the grid, in a new order.

    Args:
      tokens: a tokenised corpus.
      length: positions of a row.
      batch: rows of a batch.
      seed: of order and windows.
      mine: the rows of each batch that this host needs, of 0..batch-1; None: all. It doesn't change the batches.

    Returns an iterator of Batches [len(mine), length]. Its get_state() is JSON, the same on all hosts; set_state()
    continues from there with the same batches.

    Raises ValueError if the tokens don't fill a row, if the rows don't fill a batch, or for rows outside the batch.
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
            "set train.batch_size or data.seq_len lower"
        )
    endless = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat().random_map(rows.near)
    return _batches(endless, lambda found: rows.batch(np.stack(found)), batch, mine)


def shuffled_batches(
    rows: Sequence[Any], make: Callable[[list[Any]], Batch], *, batch: int, seed: int, mine: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """As `train_loader`, from rows that are there: each epoch takes every row once, in a new order.

    make: some rows -> their Batch. Raises ValueError if the rows don't fill a batch, or for rows outside the batch.
    """
    if not 1 <= batch <= len(rows):
        raise ValueError(f"a batch of {batch} rows can't be made from {len(rows)} rows: set train.batch_size lower")
    endless = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
    return _batches(endless, lambda found: make([rows[i] for i in found]), batch, mine)


def _batches(endless: grain.MapDataset, make: Callable, batch: int, mine: Sequence[int] | None) -> Any:
    """An iterator of make(elements of an endless data set), `batch` at a time, or those numbered `mine` of them."""
    mine = range(batch) if mine is None else mine
    if not all(0 <= row < batch for row in mine):
        raise ValueError(f"rows {list(mine)} are not rows of a batch of {batch}")

    def share(number: int) -> Batch:
        return make([endless[number * batch + row] for row in mine])

    batches = grain.MapDataset.range(len(endless) // batch).map(share)
    # a thread prefetches, so that no step waits for a disk
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(tokens: TokenArray, *, length: int, batch: int) -> Iterator[Batch]:
    """NumPy Batches [batch, length] in order: each target occurs once. Empty rows (segment 0) fill the last batch.

    Raises ValueError for a batch below 1 or a length below 2.
    """
    if batch < 1:
        raise ValueError(f"the batch size must be at least 1; got {batch}")
    rows = PackedRows(tokens=tokens, length=length)
    starts = range(0, len(rows), batch)
    return (
        rows.batch(np.stack([rows[i] for i in range(at, at + batch)])) for at in starts
    )  # rows past the end are empty
