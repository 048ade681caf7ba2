"""Text to pieces and back: SentencePiece models trained so that every text comes back unchanged."""

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece

SAMPLE_BYTES = 4_000_000  # of text, at most, that a tokenizer is trained on; twice as much doubles the time for < 1 %
BYTES_A_PIECE = 400  # and more than that where many pieces are asked for: 4 MB of text don't hold 50,000
SEEDS = 8  # candidates per piece that training starts from; SentencePiece's million takes twice as long for no gain
LINE_CHARS = 2_000  # longer lines are cut for training, since SentencePiece would skip them
SPACE = "▁"  # how SentencePiece writes a space
MASK = "░"  # how a mask is shown
THREADS = 4  # fixed, since partial sums are added per thread and their order changes the pieces


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A SentencePiece model. Ids 0..vocab-1 are its pieces and id `vocab` is the mask.

    proto: the serialised model. ValueError if it isn't one, or has no end-of-text piece.
    """

    proto: bytes = field(repr=False)

    def __post_init__(self):
        if self._processor.eos_id() < 0:
            raise ValueError("the tokenizer has no end-of-text piece: train it with an eos_id of 0 or more")

    @classmethod
    def from_bytes(cls, proto: bytes) -> "Tokenizer":
        return cls(proto=proto)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a SentencePiece .model file. FileNotFoundError or ValueError, naming it."""
        try:
            return cls(proto=Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        except RuntimeError as error:
            raise ValueError("not a SentencePiece model: give a .model file") from error

    @property
    def vocab(self) -> int:
        """V, the number of pieces."""
        return self._processor.get_piece_size()

    @property
    def mask(self) -> int:
        """The id after the last piece."""
        return self.vocab

    @property
    def eos(self) -> int:
        """End of text: SentencePiece's eos."""
        return self._processor.eos_id()

    @property
    def bos(self) -> int:
        """Begin of text; the end-of-text piece where a model has none."""
        bos = self._processor.bos_id()
        return bos if bos >= 0 else self.eos

    @functools.cached_property
    def suppressed(self) -> tuple[int, ...]:
        """Pieces that no sampler may write: unknown, begin of text and other control pieces, but not end of text."""
        sp = self._processor
        return tuple(i for i in range(self.vocab) if (sp.is_control(i) or sp.is_unknown(i)) and i != self.eos)

    @property
    def unknown(self) -> int:
        """The piece that stands for what the model can't write; -1 if it has none. Text so encoded is lost."""
        return self._processor.unk_id()

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the model."""
        return hashlib.sha256(self.proto).hexdigest()[:16]

    @functools.cached_property
    def _space_bytes(self) -> list[int]:
        """The byte pieces of a literal ▁, which SentencePiece would take for a space; empty if there are none."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return ids if all(self._processor.is_byte(i) for i in ids) else []

    def encode(self, text: str) -> np.ndarray:
        """int32 [n], without begin or end of text."""
        if not self._space_bytes or SPACE not in text:
            return np.asarray(self._processor.encode(text), np.int32)
        first, *rest = self._processor.encode(text.split(SPACE))
        return np.asarray(first + [i for ids in rest for i in self._space_bytes + ids], np.int32)

    def decode(self, ids) -> str:
        """The text of [n] pieces. Control pieces write nothing; bytes that aren't UTF-8 become U+FFFD.

        ValueError for a mask or any other id that is no piece.
        """
        ids = np.asarray(ids).reshape(-1).tolist()
        self._check(ids, self.vocab)
        return self._processor.decode(ids)

    def pieces(self, ids) -> list[str]:
        r"""What each id reads as on a screen: ' ' for ▁, '\xNN' for a byte, '░' for a mask."""
        ids = np.asarray(ids).reshape(-1).tolist()
        self._check(ids, self.vocab + 1)
        return [self._shown[i] for i in ids]

    @functools.cached_property
    def _shown(self) -> list[str]:
        def shown(i: int) -> str:
            piece = self._processor.id_to_piece(i)
            return rf"\x{piece[3:5].lower()}" if self._processor.is_byte(i) else piece.replace(SPACE, " ")

        return [*map(shown, range(self.vocab)), MASK]

    def _check(self, ids: list[int], end: int):
        wrong = next((i for i in ids if not 0 <= i < end), None)
        if wrong is not None:
            what = "the mask" if wrong == self.mask else f"none of the {self.vocab} pieces"
            raise ValueError(f"id {wrong} is {what} and has no text: remove it first")


def train_tokenizer(texts: Iterable[str], *, vocab: int, kind: str = "unigram") -> Tokenizer:
    """A tokenizer whose decode undoes its encode for every text; the same texts give the same tokenizer.

    kind 'unigram': a unigram language model (Kudo, arXiv 1804.10959) of exactly `vocab` pieces, 259 of them the
    control pieces and bytes. kind 'char': a piece for each character seen, at most `vocab` pieces in all. Characters
    without a piece are written as UTF-8 bytes, and a newline is always a piece of its own.

    Of more text than SAMPLE_BYTES, or BYTES_A_PIECE a piece, lines at even distances are used. ValueError if the text
    is empty or can't fill `vocab` pieces (the message says how many it can), or if `vocab` is too small.
    """
    if kind not in ("unigram", "char"):
        raise ValueError(f"tokenizer kind {kind!r}: choose 'unigram' or 'char'")
    seen = set()
    lines = _sample(_lines(texts, seen), max(SAMPLE_BYTES, BYTES_A_PIECE * vocab))
    if not any(lines):
        raise ValueError("no text to train a tokenizer on")
    options = {"unigram": {}, "char": {"character_coverage": 1.0, "hard_vocab_limit": False}}[kind]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # source code is full of them
            byte_fallback=True,
            user_defined_symbols=sorted(seen),
            max_sentence_length=4 * LINE_CHARS,
            seed_sentencepiece_size=SEEDS * vocab,
            num_threads=THREADS,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(_cause(str(error), vocab)) from error
    return Tokenizer(proto=model.getvalue())


def _lines(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Lines of at most LINE_CHARS. SentencePiece would strip the ends of lines, so they are noted in `seen` instead."""
    for text in texts:
        seen.update({"\n", "\r"}.intersection(text))
        for line in re.split(r"[\r\n]+", text):
            for start in range(0, len(line), LINE_CHARS):
                yield line[start : start + LINE_CHARS].replace("\0", "")  # a NUL is a byte piece


def _sample(lines: Iterator[str], limit: int) -> list[str]:
    """Chain k-th line, k the least power of two for which they have at most `limit` bytes."""
    kept, size, stride = [], 0, 1
    for index, line in enumerate(lines):
        if index % stride:
            continue
        kept.append(line)
        size += len(line.encode())
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(len(line.encode()) for line in kept)
    return kept


def _cause(message: str, vocab: int) -> str:
    """One line for what SentencePiece says in several."""
    if limit := re.search(r"value <= (\d+)", message):
        return f"the text is too small for {vocab} pieces: set vocab to at most {limit[1]}"
    if required := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"{vocab} pieces are too few for this text's characters: set vocab to at least {required[1]}"
    return f"SentencePiece can't train {vocab} pieces on this text (bytes and control pieces alone are 259): {message}"
