"""Errors of a full disk, which name no file themselves."""

import errno
import os
import types

import pytest

from diffusion_lm import files, lock
from diffusion_lm.data.corpora import Texts
from diffusion_lm.data.loader import tokenize
from diffusion_lm.data.tokenizer import train_tokenizer
from diffusion_lm.training.checkpoint import CheckpointError
from diffusion_lm.training.metrics import Metrics

FULL = "/dev/full"  # every write to it fails
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"there is no {FULL}")


@needs_full
def test_the_file_and_a_remedy_are_named():
    said = r"No space left on device\): free space.*'place'"
    with pytest.raises(OSError, match=said), files.named("place"), open(FULL, "wb") as full:
        full.write(b"x")


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(lock.InUseError), files.named("place"):
        raise lock.InUseError("in use")
    with pytest.raises(FileNotFoundError, match="nothing"), files.named("place"):
        (tmp_path / "nothing").read_bytes()


@needs_full
def test_metrics_that_can_not_be_written_are_one_line(tmp_path):
    full = os.open(FULL, os.O_WRONLY)
    metrics = Metrics(tmp_path, 0, tensorboard=False)
    metrics._file.close()
    metrics._file = open(FULL, "a")  # noqa: SIM115
    metrics._board = types.SimpleNamespace(add_scalar=lambda *_: None, close=lambda: os.write(full, b"x"))
    for act in (lambda: metrics.write(1, {"loss": 1.0}), metrics.close):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl.*No space.*earlier checkpoints are intact"):
            act()
    os.close(full)


def test_a_lock_and_tokens_that_can_not_be_written_name_their_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.json, "dump", full)
    with pytest.raises(OSError, match=r"No space.*\.lock"), lock.hold(tmp_path / ".lock"):
        pass
    lock.check(tmp_path / ".lock")  # held by nobody
    monkeypatch.undo()
    monkeypatch.setattr("diffusion_lm.data.loader._write_npy", full)
    tokenizer, path = train_tokenizer(["a b"], vocab=262, kind="char"), tmp_path / "tokens.npy"
    with pytest.raises(OSError, match=r"No space.*tokens\.npy"):
        tokenize(Texts(texts=("a b",)), tokenizer, pad=0, path=path)
