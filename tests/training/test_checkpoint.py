import json
import logging
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import toy

from diffusion_lm.training.checkpoint import FORMAT, CheckpointError, Checkpointing, Checkpoints, FormatError
from diffusion_lm.training.loop import Train

# Where reading or writing fails, Orbax closes its event loop while tensorstore still has news for it.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")

JOB = toy.job(Train(ema_decay=0.5))


def state(step):
    """A state whose numbers say which step it is of."""
    return jax.tree.map(lambda x: jnp.full(x.shape, step, x.dtype), JOB.initial())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 1, 2 and 3 (of which two are kept)."""
    checkpoints = Checkpoints(tmp_path, Checkpointing(save_every=1, max_to_keep=2))
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"next": step}, toy.META)
    checkpoints.close()
    return checkpoints


def largest_file(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    return max(files, key=lambda path: path.stat().st_size)


def test_all_comes_back_and_the_oldest_goes(saved):
    assert saved.steps() == [2, 3]
    step, restored, data = saved.restore(JOB.abstract)
    assert step == 3 and data == {"next": 3}
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))
    assert saved.meta() == (3, toy.META)
    assert saved.meta(2) == (2, toy.META)


def test_parameters_alone(saved):
    for ema in (True, False):
        step, params = saved.restore_params(JOB.abstract.params, step=2, ema=ema)
        assert step == 2
        jax.tree.map(np.testing.assert_array_equal, params, state(2).params)


@pytest.mark.parametrize("other", [None, 1, 3])
def test_another_format_is_refused_in_a_line_and_stays(saved, other):
    """It isn't damaged: it is neither passed over nor moved away."""
    path = next(saved.path(3).rglob("meta/metadata"))
    meta = json.loads(path.read_text())
    assert meta["format"] == FORMAT == 2
    path.write_text(json.dumps({k: v for k, v in meta.items() if k != "format"} | ({"format": other} if other else {})))
    with pytest.raises(
        FormatError, match=f"format {other}, this version reads 2: use the version that wrote it"
    ) as error:
        saved.meta()
    assert "\n" not in str(error.value) and saved.steps() == [2, 3]


def test_nothing_there(tmp_path):
    empty = Checkpoints(tmp_path / "none")
    assert empty.steps() == [] and empty.meta() is None and empty.restore(JOB.abstract) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        empty.restore_params(JOB.abstract.params)
    assert not (tmp_path / "none").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.cases(4)
@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("item", ["params", "optimizer", "data", "meta"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(saved, caplog, damage, item):
    damage(largest_file(saved.path(3) / item))
    with caplog.at_level(logging.WARNING, logger="diffusion_lm"):
        restored = saved.restore(JOB.abstract)
    if restored.step == 3:  # the damage was to bytes that say nothing
        assert damage is flip
        jax.tree.map(np.testing.assert_array_equal, restored.state, state(3))
        return
    assert restored.step == 2 and restored.data == {"next": 2}
    line = next(r.getMessage() for r in caplog.records if "can't be used" in r.getMessage())
    assert str(saved.path(3)) in line and "\n" not in line
    saved.save(3, state(3), {"next": 3}, toy.META)  # its place is free again
    saved.close()
    assert saved.restore(JOB.abstract).step == 3


def test_other_bits_than_were_saved_are_noticed(saved, monkeypatch):
    """Whatever the storage lets through."""
    monkeypatch.setattr("diffusion_lm.training.checkpoint._bits", lambda x: jnp.uint32(1))
    jax.clear_caches()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        saved.restore_params(JOB.abstract.params)
    jax.clear_caches()


def test_all_damaged_is_an_error_and_not_a_fresh_start(saved):
    for step in (2, 3):
        truncate(largest_file(saved.path(step) / "params"))
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*tried \[3, 2\]"):
        saved.restore(JOB.abstract)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="can't save checkpoint") as error:
        checkpoints.save(1, state(1), {}, toy.META)
        checkpoints.close()
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_earlier_checkpoints(saved):
    """A limit on the size of files stands in for the disk's end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(CheckpointError, match="can't save checkpoint") as error:
            saved.save(4, state(4), {"next": 4}, toy.META)
            saved.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert Checkpoints(saved.folder.parent).steps() == [2, 3]
    assert saved.restore(JOB.abstract).step == 3
