"""Each text token is a target once, segment_ids hold the documents, and a loader goes on where it stopped."""

import itertools
import json
import os
import threading

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging

from diffusion_lm import lock, progress
from diffusion_lm.data import loader
from diffusion_lm.data.corpora import Texts
from diffusion_lm.data.loader import PackedRows, TokenArray, eval_batches, tokenize, train_loader
from diffusion_lm.data.tokenizer import train_tokenizer

TEXTS = tuple(f"document {i}: " + "some words and more " * (i % 7) + "é\n" for i in range(40))
PAD = 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab=300, kind="char")


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return tokenize(Texts(texts=TEXTS), tokenizer, pad=PAD)


def array(flat, *, bos=1, eos=2, mask=99):
    """A TokenArray of given ids, without text."""
    counts = dict.fromkeys(("documents", "targets", "characters", "bytes", "unknown"), 0)
    return TokenArray(flat=np.asarray(flat, np.uint16), bos=bos, eos=eos, mask=mask, **counts)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


# ---- the array ----


def test_the_array_is_begin_text_end_noise(tokens, tokenizer):
    expected = []
    for text in TEXTS:
        expected += [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] + [tokenizer.mask] * PAD
    assert tokens.flat.dtype == np.uint16
    assert tokens.flat.tolist() == expected
    assert (tokens.bos, tokens.eos, tokens.mask) == (tokenizer.bos, tokenizer.eos, tokenizer.mask)


def test_counts(tokens, tokenizer):
    assert tokens.documents == len(TEXTS)
    assert tokens.characters == len("".join(TEXTS))
    assert tokens.bytes == len("".join(TEXTS).encode()) == tokens.characters + len(TEXTS)
    assert tokens.targets == sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    assert tokens.unknown == 0


def test_a_file_holds_the_same_and_is_opened_again(tokens, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "below/tokens.npy"
    written = tokenize(Texts(texts=TEXTS), tokenizer, pad=PAD, path=path)
    assert isinstance(written.flat, np.memmap)
    assert np.array_equal(written.flat, tokens.flat)
    assert sorted(file.name for file in path.parent.iterdir()) == ["tokens.json", "tokens.npy"]
    with monkeypatch.context() as patch:  # nothing is tokenised again
        patch.setattr(type(tokenizer), "encode", None)
        again = tokenize(Texts(texts=TEXTS), tokenizer, pad=PAD, path=path)
    assert np.array_equal(again.flat, tokens.flat)
    for name in ("documents", "targets", "characters", "bytes", "unknown", "bos", "eos", "mask"):
        assert getattr(again, name) == getattr(tokens, name) == getattr(written, name)
    for size in (3, 64):
        monkeypatch.setattr(loader, "BLOCK", size)
        assert np.array_equal(tokenize(Texts(texts=TEXTS), tokenizer, pad=PAD).flat, written.flat)


def test_a_file_of_anything_else_is_written_anew(tokenizer, tmp_path):
    path = tmp_path / "tokens.npy"
    other = train_tokenizer(["abc", *TEXTS], vocab=290, kind="char")
    for texts, pieces, pad in ((TEXTS, tokenizer, 3), (TEXTS, tokenizer, 4), (TEXTS, other, 4), (TEXTS[1:], other, 4)):
        found = tokenize(Texts(texts=texts), pieces, pad=pad, path=path)
        assert np.array_equal(found.flat, tokenize(Texts(texts=texts), pieces, pad=pad).flat)
        assert found.documents == len(texts)


DAMAGES = {
    "cut": lambda content: content[:-50],
    "empty": lambda _: b"",
    "zeros at its end": lambda content: content[:-50] + bytes(50),  # what a computer that lost its power may leave
    "one byte": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tokens.npy", "tokens.json"])
def test_a_damaged_file_is_written_anew(tokens, tokenizer, tmp_path, name, damage, caplog):
    path = tmp_path / "tokens.npy"
    tokenize(Texts(texts=TEXTS), tokenizer, pad=PAD, path=path)
    before = (tmp_path / name).stat()
    (tmp_path / name).write_bytes(DAMAGES[damage]((tmp_path / name).read_bytes()))
    os.utime(tmp_path / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    with caplog.at_level("WARNING", logger="absl"):
        found = tokenize(Texts(texts=TEXTS), tokenizer, pad=PAD, path=path)
    assert "damaged" in caplog.text
    assert np.array_equal(found.flat, tokens.flat)


def test_two_runs_that_write_one_file(tokens, tokenizer, tmp_path, monkeypatch):
    """The second one waits, and opens what the first one wrote."""
    path, opened = tmp_path / "tokens.npy", []

    def tokenize_again():
        opened.append(tokenize(Texts(texts=TEXTS), tokenizer, pad=PAD, path=path))

    thread = threading.Thread(target=tokenize_again)
    with lock.hold(tmp_path / "tokens.lock"):
        thread.start()
        thread.join(timeout=0.7)
        assert thread.is_alive() and not path.exists()
        key = json.loads(_written(tokenizer, tmp_path / "elsewhere.npy").read_text())
        (tmp_path / "elsewhere.npy").rename(path)
        (tmp_path / "tokens.json").write_text(json.dumps(key))
        monkeypatch.setattr(loader, "_write_npy", None)  # not called again
    thread.join()
    assert opened[0].flat.tolist() == tokens.flat.tolist() and opened[0].targets == tokens.targets
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere.json", "tokens.json", "tokens.npy"]


def _written(tokenizer, path):
    tokenize(Texts(texts=TEXTS), tokenizer, pad=PAD, path=path)
    return path.with_suffix(".json")


def test_a_failure_leaves_no_file(tokenizer, tmp_path):
    class Broken(Texts):
        def documents(self):
            yield from TEXTS
            raise ValueError("broken corpus")

    with pytest.raises(ValueError, match="broken corpus"):
        tokenize(Broken(texts=TEXTS), tokenizer, pad=PAD, path=tmp_path / "tokens.npy")
    assert list(tmp_path.iterdir()) == []


def test_counts_never_tell_of_other_tokens(tokenizer, tmp_path, monkeypatch):
    """A process that ends between the two files leaves tokens that nothing tells of, and they are written anew."""
    path, ahead, back = tmp_path / "tokens.npy", Texts(texts=TEXTS), Texts(texts=TEXTS[::-1])
    expected = tokenize(ahead, tokenizer, pad=PAD, path=path).flat.tolist()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loader.json, "dumps", _interrupt)
        tokenize(back, tokenizer, pad=PAD, path=path)
    assert np.load(path).tolist() != expected
    assert tokenize(ahead, tokenizer, pad=PAD, path=path).flat.tolist() == expected


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_large_vocabularies_need_wide_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "vocab", property(lambda self: 2**16))
    found = tokenize(Texts(texts=TEXTS), tokenizer, pad=1)
    assert found.flat.dtype == np.int32
    assert found.flat.max() == 2**16


def test_lost_text_is_reported(tokenizer, monkeypatch, caplog):
    logging.set_verbosity(logging.INFO)
    monkeypatch.setattr(type(tokenizer), "unknown", property(lambda self: int(self.encode("w")[0])))
    with caplog.at_level("INFO", logger="absl"):
        found = tokenize(Texts(texts=(*TEXTS, "")), tokenizer, pad=0)
    assert found.unknown == "".join(TEXTS).count("w")
    assert f"text without a token is lost at {found.unknown} places" in caplog.text
    assert "left out 1 documents that have no token" in caplog.text


def test_what_tokenize_refuses(tokenizer):
    with pytest.raises(ValueError, match="pad -1 is negative"):
        tokenize(Texts(texts=TEXTS), tokenizer, pad=-1)
    with pytest.raises(ValueError, match=r"a \.npy file"):
        tokenize(Texts(texts=TEXTS), tokenizer, pad=0, path="tokens.bin")
    for empty in ((), ("",)):
        with pytest.raises(ValueError, match="no document to tokenize"):
            tokenize(Texts(texts=empty), tokenizer, pad=0)


# ---- rows ----


def test_the_fields_of_a_row():
    flat = [1, 10, 11, 2, 99, 99, 1, 12, 2, 99, 99, 1, 13]
    batch = next(eval_batches(array(flat), length=14, batch=2))
    ends_repeated = [2 if i == 99 else i for i in flat]
    assert batch.tokens.tolist() == [[*ends_repeated, 99], [99] * 14]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 0], [0] * 14]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 0], [0] * 14]
    assert np.flatnonzero(batch.context_mask[0]).tolist() == [0, 6, 11]
    assert np.flatnonzero(batch.loss_mask[0]).tolist() == [1, 2, 3, 7, 8, 12]
    assert not batch.context_mask[1].any() and not batch.loss_mask[1].any()
    assert {x.dtype for x in (batch.tokens, batch.segment_ids, batch.positions)} == {np.dtype(np.int32)}
    assert batch.context_mask.dtype == batch.loss_mask.dtype == bool


@pytest.mark.parametrize(
    ("row", "segment_ids", "positions", "given", "target"),
    [
        ([10, 11, 2, 99, 1, 12], [1, 1, 1, 1, 2, 2], [0, 1, 2, 3, 0, 1], [0, 4], [1, 2, 5]),  # inside a text
        ([2, 99, 99, 1, 12, 2], [1, 1, 1, 2, 2, 2], [0, 1, 2, 0, 1, 2], [0, 3], [4, 5]),  # at its end
        ([99, 99, 1, 12, 2, 99], [0, 0, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3], [2], [3, 4]),  # behind it
    ],
)
def test_rows_that_start_within_a_document(row, segment_ids, positions, given, target):
    batch = PackedRows(tokens=array(row), length=6).batch(np.asarray([row], np.int32))
    assert batch.segment_ids.tolist() == [segment_ids]
    assert batch.positions.tolist() == [positions]
    assert np.flatnonzero(batch.context_mask[0]).tolist() == given
    assert np.flatnonzero(batch.loss_mask[0]).tolist() == target


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("length", [2, 3, 5, 9, 40])
@pytest.mark.parametrize("bos", [1, 2])
def test_every_target_once(bos, pad, length):
    """Also where one piece both begins and ends texts."""
    documents = [list(range(10, 10 + n)) for n in (1, 4, 2, 7, 3)]
    flat, expected = [], []
    for ids in documents:
        flat += [bos, *ids, 2] + [99] * pad
        expected += [*ids, 2]
    batches = list(eval_batches(array(flat, bos=bos), length=length, batch=3))
    assert np.concatenate([b.tokens[b.loss_mask] for b in batches]).tolist() == expected


@pytest.mark.parametrize("length", [7, 64])
def test_segments_are_the_documents(tokens, tokenizer, length):
    """Joined over rows, segment_ids decode to the documents: a row's first goes on with the row before's last."""
    documents = [[]]
    for found, segment_ids, positions in _rows(eval_batches(tokens, length=length, batch=4)):
        for segment in range(1, segment_ids.max() + 1):
            inside = np.flatnonzero(segment_ids == segment)
            assert positions[inside].tolist() == list(range(len(inside)))
            if segment > 1:
                documents.append([])
            documents[-1] += found[inside[inside > 0]].tolist()  # a row's first token is the last of the row before
    assert all(tokenizer.eos in document for document in documents)
    assert [tokenizer.decode(ids) for ids in documents] == list(TEXTS)


def _rows(batches):
    for batch in batches:
        yield from zip(batch.tokens, batch.segment_ids, batch.positions, strict=True)


def test_an_evaluation_fills_its_last_batch_and_needs_no_full_row(tokens):
    batches = list(eval_batches(tokens, length=64, batch=5))
    assert all(batch.tokens.shape == (5, 64) for batch in batches)
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == tokens.targets
    (only,) = eval_batches(tokens, length=2**14, batch=1)
    assert only.loss_mask.sum() == tokens.targets
    with pytest.raises(ValueError, match="batch size must be at least 1; got 0"):
        eval_batches(tokens, length=64, batch=0)
    with pytest.raises(ValueError, match=r"set data\.seq_len to 2 or more"):
        eval_batches(tokens, length=1, batch=1)


# ---- training ----

LENGTH = 17


def starts(batches, count):
    """Where in an array of distinct ids the rows of `count` batches begin."""
    return [int(i) for batch in itertools.islice(batches, count) for i in batch.tokens[:, 0]]


@pytest.fixture(scope="module")
def distinct():
    """64 rows of LENGTH - 1 ids, each id its own place, so that a row tells where it was cut."""
    return array(np.arange(64 * (LENGTH - 1) + 1), bos=5001, eos=5002, mask=5003)


def make(tokens, **options):
    return train_loader(tokens, **{"length": LENGTH, "batch": 4, "seed": 0} | options)


def test_an_epoch_takes_one_window_near_each_row(distinct):
    batches = make(distinct)
    epochs = [starts(batches, 16) for _ in range(3)]
    for epoch in epochs:
        assert sorted(start // (LENGTH - 1) for start in epoch) == list(range(64))
    orders = [[start // (LENGTH - 1) for start in epoch] for epoch in epochs]
    assert orders[0] != sorted(orders[0])
    assert orders[0] != orders[1] != orders[2]
    phases = [{start // 16: start % 16 for start in epoch} for epoch in epochs]
    assert phases[0] != phases[1] != phases[2]
    assert len(set(phases[0].values())) > 8


def test_a_row_is_a_stretch_of_the_array(distinct):
    for batch in itertools.islice(make(distinct), 20):
        assert np.array_equal(batch.tokens, batch.tokens[:, :1] + np.arange(LENGTH))


def test_batches_have_the_fields_of_their_rows(tokens):
    batch = next(make(tokens))
    assert same(batch, PackedRows(tokens=tokens, length=LENGTH).batch(batch.tokens))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


def test_the_seed_decides(distinct):
    first, second, third = (starts(make(distinct, seed=seed), 8) for seed in (3, 3, 4))
    assert first == second != third


@pytest.mark.parametrize("shares", [[range(6), range(6, 12)], [(0, 1, 4, 5), (2, 3), range(6, 12)]])
def test_hosts_read_their_rows_of_the_same_batches(distinct, shares):
    """However the rows are shared out."""
    parts = [make(distinct, batch=12, mine=mine) for mine in shares]
    for whole in itertools.islice(make(distinct, batch=12), 12):  # past the end of an epoch
        for mine, part in zip(shares, parts, strict=True):
            assert np.array_equal(next(part).tokens, whole.tokens[list(mine)])


def test_a_position_in_the_data_holds_for_any_share(distinct):
    two, whole = make(distinct, batch=12, mine=range(6)), make(distinct, batch=12)
    expected = [next(whole) for _ in range(9)][-1]
    for _ in range(8):
        next(two)
    whole.set_state(two.get_state())
    assert same(next(whole), expected)


def test_a_resumed_loader_goes_on_as_if_never_stopped(tokens):
    batches = make(tokens, mine=(1, 3))
    for _ in range(40):  # past the end of an epoch
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(30)]
    resumed = make(tokens, mine=(1, 3))
    next(resumed)
    resumed.set_state(state)
    assert all(same(a, next(resumed)) for a in expected)
    batches.set_state(state)
    assert same(expected[0], next(batches))


def test_orbax_saves_and_restores_a_loader(tokens, tmp_path):
    batches = make(tokens)
    next(batches)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        expected = next(batches)
        resumed = make(tokens)
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    assert same(expected, next(resumed))


def test_one_row_a_batch_and_a_row_as_long_as_the_array(tokens):
    assert next(make(tokens, batch=1)).tokens.shape == (1, LENGTH)
    batch = next(make(tokens, length=len(tokens.flat), batch=1))
    assert batch.tokens.tolist() == [np.where(tokens.flat == tokens.mask, tokens.eos, tokens.flat).tolist()]


def test_what_train_loader_refuses(tokens):
    size = len(tokens.flat)
    with pytest.raises(
        ValueError, match=rf"{size} tokens don't fill a row of {size + 1}: set data\.seq_len to at most"
    ):
        make(tokens, length=size + 1)
    with pytest.raises(ValueError, match=r"set data\.seq_len to 2 or more"):
        make(tokens, length=1)
    rows = len(PackedRows(tokens=tokens, length=LENGTH))
    make(tokens, batch=rows)
    with pytest.raises(ValueError, match=rf"a batch of {rows + 1} rows can't be made from {rows} rows"):
        make(tokens, batch=rows + 1)
    with pytest.raises(ValueError, match="a batch of 0 rows"):
        make(tokens, batch=0)
    with pytest.raises(ValueError, match=r"rows \[3, 4\] are not rows of a batch of 4"):
        make(tokens, mine=(3, 4))


def test_progress_counts_each_part(tokens, tokenizer, caplog, monkeypatch):
    logging.set_verbosity(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS", 0)
    with caplog.at_level("INFO", logger="absl"):
        tokenize(Texts(texts=TEXTS), tokenizer, pad=0, name="the train part")
    assert "tokenizing the train part: 40 documents" in caplog.text
    assert f"tokenized the train part: 40 documents, {tokens.targets} tokens, {tokens.bytes} bytes" in caplog.text


def test_a_lossless_tokenizer_changes_nothing(tokens):
    assert tokens.changed == 0
