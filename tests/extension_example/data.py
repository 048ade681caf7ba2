"""A corpus that is computed, and a tokenizer of UTF-8 bytes. Their fields are all that a checkpoint stores of them."""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """Documents such as '3 + 4 = 7'."""

    below: int

    def documents(self) -> Iterator[str]:
        return (f"{a} + {b} = {a + b}" for a in range(self.below) for b in range(self.below))

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.documents()).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utf8:
    """A token for each byte, then begin and end of text, then the mask."""

    bos: int = 256
    eos: int = 257
    mask: int = 258
    unknown: int = -1
    adds_bos: bool = True

    @property
    def vocab(self) -> int:
        return 258

    @property
    def stops(self) -> tuple[int, ...]:
        return (self.eos,)

    @property
    def suppressed(self) -> tuple[int, ...]:
        return (self.bos,)

    @property
    def fingerprint(self) -> str:
        return f"utf-8 {self.bos} {self.eos} {self.mask}"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def pieces(self, ids) -> list[str]:
        return ["░" if i == self.mask else chr(int(i)) if i < 128 else f"<{int(i)}>" for i in ids]
