"""Text to token ids and back: the protocol, SentencePiece models, and text that follows a prompt.

`train_tokenizer` trains SentencePiece models that give every text back unchanged. Models of others often normalise:
`lossless` says whether one does, and `data.loader` then counts what changes.
"""

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
from absl import logging

from diffusion_lm.data.text_parts import sliced, whole_lines

SAMPLE_BYTES = 4_000_000  # of text, at most, that a tokenizer is trained on; twice as much doubles the time for < 1 %
BYTES_PER_TOKEN = 400  # a larger vocabulary needs more text: 4 MB don't hold 50,000 tokens
SEEDS_PER_TOKEN = 8  # candidates that training starts from; SentencePiece's million takes twice as long for no gain
LINE_CHARS = 2_000  # longer lines are cut for training, since SentencePiece would skip them
SPACE = "▁"  # how SentencePiece writes a space
MASK = "░"  # how a mask is shown
_BYTE = re.compile(r"\\x[0-9a-f]{2}")  # how pieces show one
_BEFORE = ("a", ".", "0", "|")  # one of them stands before a text that follows another
CHUNK_CHARS = 1_000_000  # longer texts are encoded in chunks: SentencePiece takes some 100 bytes a token
SLICE_CHARS = 1 << 16  # the same where characters are tokens, so that chunks may be cut anywhere
THREADS = 4  # fixed, since partial sums are added per thread and their order changes the vocabulary
# Leading, double and trailing spaces, line ends, composed and compatibility characters, capitals, rare letters.
PROBE = " a  b\n\nC\t\r\n ﬁ e\u0301 Å \u3000 ▁ Ж \U0001f600 \ufeff x "


class Tokenizer(Protocol):
    """A frozen dataclass that maps text to ids and back. Its fields (plain values or bytes) go into the checkpoint.

    vocab        V: ids 0..V-1 have logits
    mask         the mask's id
    bos, eos     begin and end of text; they may be the same id
    unknown      the id that stands for text without a token; -1 if there is none
    suppressed   ids that no sampler may emit
    stops        ids that end an answer: eos, and a chat model's end of turn
    adds_bos     whether a text begins with bos
    fingerprint  changes whenever the mapping does
    """

    @property
    def vocab(self) -> int: ...
    @property
    def mask(self) -> int: ...
    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def unknown(self) -> int: ...
    @property
    def suppressed(self) -> tuple[int, ...]: ...
    @property
    def stops(self) -> tuple[int, ...]: ...
    @property
    def adds_bos(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> np.ndarray:
        """int32 [n], without begin or end of text."""

    def decode(self, ids) -> str:
        """The text of [n] ids; begin and end of text give none."""

    def pieces(self, ids) -> list[str]:
        """What each id looks like on a screen, masks included."""


def encode_prompt(tokenizer: Tokenizer, text: str, *, follows: bool = False) -> np.ndarray:
    """The ids of a text that a user typed: int32 [n]. follows: it comes after other text (see `encode_continuation`).

    Raises ValueError if the tokenizer has no token for a part of it. Warns if the tokenizer changes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[:40]!r} is not valid UTF-8 (character {error.start}): retype it") from None
    ids = encode_continuation(tokenizer, text) if follows else tokenizer.encode(text)
    if tokenizer.unknown >= 0 and np.any(ids == tokenizer.unknown):
        lost = "".join(dict.fromkeys(c for c in text if np.any(tokenizer.encode(c) == tokenizer.unknown)))
        raise ValueError(f"the tokenizer has no token for {lost or text!r} in {text[:40]!r}: leave it out")
    before = tokenizer.encode(_BEFORE[0]) if follows else []
    if not lossless(tokenizer) and (read := decode_continuation(tokenizer, before, ids)) != text:
        logging.warning("the tokenizer changes %r: the model sees %r", text[:80], read[:80])
    return ids


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """What each id writes: its piece; for a byte the character that it is alone, U+FFFD where it is a part of one."""
    pieces = tokenizer.pieces(range(tokenizer.vocab))
    return [tokenizer.decode([i]) if _BYTE.fullmatch(piece) else piece for i, piece in enumerate(pieces)]


def with_bos(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """What a network is given of a prompt, int32 [n], n >= 1: after a begin of text, where the tokenizer's texts have
    one, or where there is nothing else."""
    return ids if len(ids) and not tokenizer.adds_bos else np.concatenate([[tokenizer.bos], ids]).astype(np.int32)


def encode_continuation(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text that follows other text, int32 [n]: `decode_continuation` gives it back.

    Encoded alone, it would begin with the space that most SentencePiece models put before a text. So it is encoded
    after a character whose token stays apart. A tokenizer that changes the text itself may still do so.
    """
    plain = tokenizer.encode(text)
    if decode_continuation(tokenizer, tokenizer.encode(_BEFORE[0]), plain) == text:
        return plain
    found = []
    for before in _BEFORE:
        first, whole = tokenizer.encode(before), tokenizer.encode(before + text)
        rest = whole[len(first) :]
        if tokenizer.decode(first) and np.array_equal(whole[: len(first)], first):
            if decode_continuation(tokenizer, first, rest) == text:
                return rest
            found.append(rest)
    return found[0] if found else plain


def decode_continuation(tokenizer: Tokenizer, prompt_ids, ids) -> str:
    """The text of `ids` [n] as they follow `prompt_ids` [m].

    Decoding `ids` alone would drop the space before the first word in most SentencePiece models.
    """
    prompt = np.asarray(prompt_ids, np.int32).reshape(-1)
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode(np.concatenate([prompt, np.asarray(ids, np.int32).reshape(-1)]))
    # A prompt that ends inside a character's bytes decodes to U+FFFD there: the continuation completes it.
    same = (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
    return whole[next(same, len(before)) :]


def encode_parts(tokenizer: Tokenizer, parts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of a text in parts, int32 [n] each, as if it were whole.

    One array, unless the tokenizer is lossless and has encode_parts.
    """
    if hasattr(tokenizer, "encode_parts") and lossless(tokenizer):
        return tokenizer.encode_parts(parts)
    return iter((tokenizer.encode("".join(parts)),))


def spelled(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> str:
    """What is left of a text in its ids [n]: text without a token spells nothing."""
    return text if lossless(tokenizer) else decode_continuation(tokenizer, (), ids[ids != tokenizer.unknown])


def first_difference(a: str, b: str) -> tuple[str, str]:
    """The stretches around the first character in which two texts differ."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return tuple(text[max(at - 10, 0) : at + 10] for text in (a, b))


@functools.lru_cache(maxsize=32)
def lossless(tokenizer: Tokenizer) -> bool:
    """Whether decode gives back what encode was given, tried on one difficult text."""
    try:
        return tokenizer.decode(tokenizer.encode(PROBE)) == PROBE
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """A SentencePiece model (arXiv 1808.06226). Ids 0..vocab-1 are its tokens; id `vocab` is the mask.

    proto: the serialised model. Raises ValueError if it isn't one, or has no end-of-text token.
    """

    proto: bytes = field(repr=False)
    adds_bos = True  # not annotated, so no field

    def __post_init__(self):
        if self._processor.eos_id() < 0:
            raise ValueError("the tokenizer has no end-of-text token: train it with an eos_id of 0 or more")

    @classmethod
    def load(cls, path: str | Path) -> "SentencePiece":
        """Reads a .model file. Raises FileNotFoundError or ValueError, naming the file."""
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
        """V, the number of tokens."""
        return self._processor.get_piece_size()

    @property
    def mask(self) -> int:
        """The id after the last token."""
        return self.vocab

    @property
    def eos(self) -> int:
        """End of text: SentencePiece's eos."""
        return self._processor.eos_id()

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return (self.eos,)

    @property
    def bos(self) -> int:
        """Begin of text; the end-of-text token if the model has none."""
        bos = self._processor.bos_id()
        return bos if bos >= 0 else self.eos

    @functools.cached_property
    def suppressed(self) -> tuple[int, ...]:
        """Ids that no sampler may emit: unknown, begin of text and other control tokens, but not end of text."""
        sp = self._processor
        return tuple(i for i in range(self.vocab) if (sp.is_control(i) or sp.is_unknown(i)) and i != self.eos)

    @property
    def unknown(self) -> int:
        """The id that stands for text without a token, which is lost; -1 if there is none."""
        return self._processor.unk_id()

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the model."""
        return hashlib.sha256(self.proto).hexdigest()[:16]

    @functools.cached_property
    def _space_bytes(self) -> list[int]:
        """The byte tokens of a literal ▁, which SentencePiece would take for a space; empty if there are none."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return ids if all(self._processor.is_byte(i) for i in ids) else []

    def encode(self, text: str) -> np.ndarray:
        """int32 [n], without begin or end of text."""
        return self._encode(text) if len(text) <= SLICE_CHARS else np.concatenate([*self.encode_parts([text])])

    def encode_parts(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """The same of a text in parts, so that neither a long text nor all of its ids are in memory."""
        if self._cuts_anywhere:
            return (self._encode(short) for part in parts for short in sliced(part, SLICE_CHARS))
        return map(self._encode, whole_lines(parts, CHUNK_CHARS) if self._cuts_at_newlines else ["".join(parts)])

    @functools.cached_property
    def _cuts_anywhere(self) -> bool:
        """Whether each character is encoded for itself, as by the character models that are trained here."""
        sp = self._processor
        own = [i for i in range(self.vocab) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
        pieces = list(map(sp.id_to_piece, own))
        single = lossless(self) and all(len(piece) == 1 for piece in pieces)
        return single and sp.encode("".join(pieces).replace(SPACE, " ")) == own

    @functools.cached_property
    def _cuts_at_newlines(self) -> bool:
        """Whether no token joins a newline with other text, so that lines can be encoded one by one."""
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab)]
        return lossless(self) and [piece for piece in pieces if "\n" in piece] == ["\n"]

    def _encode(self, text: str) -> np.ndarray:
        if not self._space_bytes or SPACE not in text:
            return np.asarray(self._processor.encode(text), np.int32)
        first, *rest = self._processor.encode(text.split(SPACE))
        return np.asarray(first + [i for ids in rest for i in self._space_bytes + ids], np.int32)

    def decode(self, ids) -> str:
        """The text of [n] ids. Control tokens have none; bytes that aren't UTF-8 become U+FFFD.

        Raises ValueError for the mask and for ids outside the vocabulary.
        """
        ids = np.asarray(ids).reshape(-1).tolist()
        self._check(ids, self.vocab)
        return self._processor.decode(ids)

    def pieces(self, ids) -> list[str]:
        r"""What each id looks like on a screen: ' ' for ▁, '\xNN' for a byte, '░' for the mask."""
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
            what = "the mask" if wrong == self.mask else f"none of the {self.vocab} tokens"
            raise ValueError(f"id {wrong} is {what} and has no text: remove it first")


def train_tokenizer(texts: Iterable[str | Iterable[str]], *, vocab: int, kind: str = "unigram") -> SentencePiece:
    """Trains a tokenizer that gives every text back unchanged; the same texts give the same tokenizer.

    Args:
      texts: documents, each whole or in parts. If they hold more than SAMPLE_BYTES (or BYTES_PER_TOKEN a token), evenly
        spaced lines are used.
      vocab: the number of tokens, 259 of which are control tokens and bytes.
      kind: 'unigram', a unigram language model (Kudo, arXiv 1804.10959) of exactly `vocab` tokens; or 'char', one
        token for each character that occurs, at most `vocab` in all.

    A character without a token becomes its UTF-8 bytes. A newline is always a token of its own. Raises ValueError if
    there is no text, if it can't fill `vocab` tokens (the message says how many it can) or if `vocab` is too small.
    """
    if kind not in ("unigram", "char"):
        raise ValueError(f"tokenizer kind {kind!r}: choose 'unigram' or 'char'")
    logging.info("reading the text and training a tokenizer on it")
    seen = set()
    lines = _sample(_lines(texts, seen), max(SAMPLE_BYTES, BYTES_PER_TOKEN * vocab))
    if not any(lines):
        raise ValueError("no text to train a tokenizer on")
    if not any(" " in line or SPACE in line for line in lines):
        seen.add(SPACE)  # SentencePiece would spell a later space in bytes, and read them as ▁
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
            seed_sentencepiece_size=SEEDS_PER_TOKEN * vocab,
            num_threads=THREADS,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(_cause(str(error), vocab)) from error
    return SentencePiece(proto=model.getvalue())


def _lines(texts: Iterable[str | Iterable[str]], seen: set[str]) -> Iterator[str]:
    """Lines of at most LINE_CHARS. SentencePiece would strip line ends, so `seen` collects those that occur."""
    for text in texts:
        line = ""
        for part in sliced(text) if isinstance(text, str) else text:
            seen.update({"\n", "\r"}.intersection(part))
            *whole, line = re.split("[\r\n]", line + part)
            for each in whole:
                yield from _stretches(each)
            end = len(line) // LINE_CHARS * LINE_CHARS
            yield from _stretches(line[:end])
            line = line[end:]
        yield from _stretches(line)


def _stretches(line: str) -> Iterator[str]:
    """Without NULs, which are byte tokens."""
    return (line[start : start + LINE_CHARS].replace("\0", "") for start in range(0, len(line), LINE_CHARS))


def _sample(lines: Iterator[str], limit: int) -> list[str]:
    """Every k-th line, k the least power of two for which they have at most `limit` bytes."""
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
    """One line for SentencePiece's several."""
    if limit := re.search(r"value <= (\d+)", message):
        return f"the text is too small for {vocab} tokens: set vocab_size to at most {limit[1]}"
    if required := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"{vocab} tokens are too few for this text's characters: set vocab_size to at least {required[1]}"
    return f"{vocab} tokens are too few: bytes and control tokens alone are 259, so set vocab_size higher"
