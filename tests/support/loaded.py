"""Random networks as loaded models, with a tokenizer of nine letters: nothing is trained, nothing lies on a disk."""

import dataclasses

import numpy as np

from diffusion_lm.config import Config
from diffusion_lm.data.source import NoData
from diffusion_lm.loaded_model import LoadedModel
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import CheckpointMeta
from support.small import FLOAT32, MASK, SPECS, VOCAB, bound

LETTERS = "abcdefg \n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letters:
    """LETTERS are ids 0 to 8; 9 begins a text, 10 ends it."""

    vocab, mask, bos, eos, unknown = VOCAB, MASK, 9, 10, -1
    suppressed, stops, adds_bos, fingerprint = (9,), (10,), True, "letters"

    def encode(self, text):
        return np.array([LETTERS.index(letter) for letter in text], np.int32)

    def decode(self, ids):
        return "".join(LETTERS[i] for i in np.asarray(ids).reshape(-1) if i < 9)

    def pieces(self, ids):
        return [(LETTERS + "<>░")[i] for i in ids]


def loaded(objective, process=None, context: int = 24) -> LoadedModel:
    """A random network that stands for one trained with this objective."""
    process = (process or Absorbing()).sized(mask=MASK, width=16).as_static()
    data = NoData(source="nowhere", seq_len=context, vocab_size=VOCAB)
    config = Config(data=data, model=SPECS["plain"], process=process, objective=objective, exec=FLOAT32)
    meta = CheckpointMeta(config={}, tokenizer={}, corpus="")
    return LoadedModel(config, Letters(), process, bound(SPECS["plain"]), 0, meta, {})
