"""What a config trains on: the protocols, and `Data`, which is text."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from diffusion_lm.data import corpora, loader
from diffusion_lm.data.corpora import Corpus
from diffusion_lm.data.tokenizer import SentencePiece, Tokenizer, train_tokenizer
from diffusion_lm.layouts import Layout
from diffusion_lm.types import Batch


class TokenizedData(Protocol):
    """Data as batches of token ids.

    fingerprint  changes with the data; a checkpoint records it, and a run resumes only with the same
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def fingerprint(self) -> str: ...

    def train_batches(self, *, length: int, batch: int, seed: int, mine: Sequence[int] | None = None) -> Any:
        """Endless NumPy Batches [len(mine), length], rows `mine` of each; see `loader.train_loader`.

        The iterator has get_state() -> JSON and set_state(), which continues from there.
        """

    def valid_batches(self, *, length: int, batch: int) -> Iterator[Batch]:
        """NumPy Batches [batch, length] of what is held out, in order; empty rows fill the last."""


class DataSource(Protocol):
    """`Config.data`: a frozen dataclass.

    seq_len     positions of a row
    vocab_size  ids of its tokenizer, at most
    """

    @property
    def seq_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def open(
        self, layout: Layout, *, tokenizer: Tokenizer | None = None, fingerprint: str | None = None
    ) -> TokenizedData:
        """Opens the data.

        Args:
          layout: the objective's; it says where canvases lie in a row.
          tokenizer: the checkpoint's, if a run resumes; None makes or loads one.
          fingerprint: of the data that the checkpoint was trained on.

        Raises ValueError or OSError with one line if the data can't be read, or if its fingerprint differs.
        """


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text, and how it becomes rows of tokens.

    path             python-docs, python-source, a file, a folder or a glob (see `corpora.corpus`); or a Corpus
    document_unit    what a document is: a whole file (or record), a line or a paragraph
    field            the key of a JSON record that holds the text
    seq_len          positions of a row, at least 2
    val_fraction     the share of documents that is held out, in [0, 1)
    tokenizer        a SentencePiece .model file, or a Tokenizer; none: train one of vocab_size tokens
    vocab_size       tokens of a tokenizer that is trained
    tokenizer_kind   its kind: a unigram language model, or a token for each character
    token_cache_dir  a folder to keep the token ids in, for large corpora; none: memory
    """

    path: str | Corpus
    document_unit: Literal["file", "line", "paragraph"] = "file"
    field: str = "text"
    seq_len: int = 256
    val_fraction: float = 0.1
    tokenizer: str | Tokenizer | None = None
    vocab_size: int = 8192
    tokenizer_kind: Literal["unigram", "char"] = "unigram"
    token_cache_dir: str | None = None

    def __post_init__(self):
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len must be at least 2; got {self.seq_len}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction must lie in [0, 1); got {self.val_fraction}")
        if self.vocab_size < 1:
            raise ValueError(f"data.vocab_size must be at least 1; got {self.vocab_size}")

    def corpus(self) -> Corpus:
        """The documents, training and held-out. Raises FileNotFoundError or ValueError if there are none."""
        if not isinstance(self.path, str):
            return self.path
        try:
            return corpora.corpus(self.path, documents=self.document_unit, field=self.field)
        except FileNotFoundError as error:
            hint = "the config's docstring says where to get it"
            if not Path(self.path).expanduser().is_absolute():
                hint = f"it is looked for from {Path.cwd()}; {hint}"
            raise FileNotFoundError(f"data.path={self.path}: {error}; {hint}") from None

    def open(
        self, layout: Layout, *, tokenizer: Tokenizer | None = None, fingerprint: str | None = None
    ) -> "TokenizedCorpus":
        """See `DataSource`. Raises ValueError, too, if data.tokenizer is another than the checkpoint's."""
        given = check_tokenizer(self.tokenizer, tokenizer)
        corpus = self.corpus()
        found = corpus.fingerprint()
        if fingerprint not in (None, found):
            raise ValueError(
                f"data.path={self.path} is not the text that the checkpoint was trained on; use a new workdir"
            )
        return TokenizedCorpus(data=self, corpus=corpus, given=given, fingerprint=found, pad=layout.pad)


def check_tokenizer(named: str | Tokenizer | None, found: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that a config names, a .model file or a Tokenizer, or else the checkpoint's.

    Raises ValueError if both are there and differ.
    """
    given = SentencePiece.load(named) if isinstance(named, str) else named
    if found is not None and given is not None and given.fingerprint != found.fingerprint:
        raise ValueError(f"data.tokenizer={named} is not the checkpoint's tokenizer; use a new workdir")
    return found or given


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedCorpus:
    """A corpus as tokens. Each part is tokenised when it is first asked for.

    given  the tokenizer; None: train one on the training part
    pad    masks after each end of text
    """

    data: Data
    corpus: Corpus
    given: Tokenizer | None
    fingerprint: str
    pad: int

    @functools.cached_property
    def parts(self) -> tuple[Corpus, Corpus]:
        """The documents to train on, and those held out."""
        return corpora.split(self.corpus, self.data.val_fraction)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        data = self.data
        texts = corpora.document_parts(self.parts[0])
        return self.given or train_tokenizer(texts, vocab=data.vocab_size, kind=data.tokenizer_kind)

    @functools.cached_property
    def train(self) -> loader.TokenArray:
        """The training part."""
        return self._tokens(self.parts[0], "train")

    @functools.cached_property
    def valid(self) -> loader.TokenArray | None:
        """The held-out part; None if data.val_fraction is 0."""
        return self._tokens(self.parts[1], "valid") if self.data.val_fraction else None

    def _tokens(self, part: Corpus, name: str) -> loader.TokenArray:
        folder = self.data.token_cache_dir
        path = None if folder is None else Path(folder) / f"{name}.npy"
        return loader.tokenize(part, self.tokenizer, pad=self.pad, path=path, name=f"the {name} part")

    def train_batches(self, **how) -> Iterator[Batch]:
        """See `loader.train_loader`."""
        return loader.train_loader(self.train, **how)

    def valid_batches(self, **how) -> Iterator[Batch]:
        """See `loader.eval_batches`; none if nothing is held out."""
        return iter(()) if self.valid is None else loader.eval_batches(self.valid, **how)


@dataclass(frozen=True, kw_only=True)
class NoData:
    """The data of a model that was converted: none came with it.

    source      where the model came from
    seq_len     positions that it was trained for
    vocab_size  its token ids
    """

    source: str
    seq_len: int
    vocab_size: int

    def open(
        self, layout: Layout, *, tokenizer: Tokenizer | None = None, fingerprint: str | None = None
    ) -> "TokenizedData":
        """Raises ValueError: there is nothing to open."""
        raise ValueError(
            f"the model of {self.source} came without text: say which with --data, or train in a new workdir"
        )
