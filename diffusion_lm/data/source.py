"""What a config's `data` has to be: anything that gives batches, be it text or examples made on the fly."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from diffusion_lm.data.tokenizer import Tokenizer
from diffusion_lm.layouts import Layout
from diffusion_lm.types import Batch


class TokenizedData(Protocol):
    """Data in a tokenizer's ids, ready to be read in batches.

    fingerprint  a checkpoint records it; a run only resumes on data with the same one
    """

    tokenizer: Tokenizer
    fingerprint: str

    def train_batches(
        self, *, length: int, batch: int, seed: int, mine: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Endless NumPy Batches [batch, length], or only their rows `mine`.

        The iterator also has get_state() -> JSON values and set_state(), so that a run resumes at the next batch.
        """

    def valid_batches(self, *, length: int, batch: int) -> Iterator[Batch]:
        """NumPy Batches [batch, length] of the held-out part, each example once."""


class DataSource(Protocol):
    """The `data` of a config: a frozen dataclass.

    seq_len     positions of a row
    vocab_size  ids of its tokenizer at most
    """

    seq_len: int
    vocab_size: int

    def open(
        self, layout: Layout, *, tokenizer: Tokenizer | None = None, fingerprint: str | None = None
    ) -> TokenizedData:
        """Reads what there is to read.

        Args:
          layout: of the objective; it says where canvases lie in a row.
          tokenizer: the checkpoint's, where a run resumes; None makes or loads one.
          fingerprint: of the data that the checkpoint was trained on.

        Raises:
          ValueError, OSError: with one line, where the data can't be read or aren't those of the fingerprint.
        """
