"""Corpora give documents as they are, in order; errors name the place; a split moves no document."""

import bz2
import gzip
import json
import lzma
import random
import re

import pytest
from absl import logging

from diffusion_lm import progress
from diffusion_lm.data.corpora import Texts, corpus, split
from diffusion_lm.data.source import Data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\n \nthree\n")
    (tmp_path / "b/c.md").write_bytes("ä\tfour\n".encode())
    (tmp_path / "d.jsonl").write_text('{"text": "five\\nsix", "n": 1}\n{"text": "seven"}\n')
    return tmp_path


def read(path, **options):
    return list(corpus(str(path), **options).documents())


def test_files_folders_and_globs(folder):
    a, c, d = "one\r\ntwo\n\n \nthree\n", "ä\tfour\n", ["five\nsix", "seven"]
    assert read(folder / "a.txt") == [a]
    assert read(folder) == [a, c, *d]
    assert read(folder / "*.*") == [a, *d]
    assert read(folder / "**") == [a, c, *d]


def test_units_and_fields(folder):
    assert read(folder / "a.txt", documents="line") == ["one", "two", "three"]
    assert read(folder / "a.txt", documents="paragraph") == ["one\r\ntwo", "three"]
    assert read(folder / "d.jsonl", documents="line") == ["five", "six", "seven"]
    (folder / "d.jsonl").write_text('{"body": "x"}\n\n{"body": ""}\n')
    assert read(folder / "d.jsonl", field="body") == ["x"]


def test_empty_documents_and_unknown_files_are_counted(folder, caplog):
    logging.set_verbosity(logging.INFO)
    (folder / "x.bin").write_bytes(b"\0")
    (folder / "y.bin").write_bytes(b"\0")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "empty.txt").write_text(" \n")
    with caplog.at_level("INFO", logger="absl"):
        assert len(read(folder)) == 4
    assert "left out 3 files that aren't known as text: 2 .bin, 1 hidden" in caplog.text
    assert "skipped 1 empty documents, read 4" in caplog.text


def test_the_fingerprint_changes_with_content_names_and_reading(folder):
    def fingerprint(**options):
        return corpus(str(folder), **options).fingerprint()

    seen = [fingerprint()]
    assert seen[0] == fingerprint()
    seen += [fingerprint(documents="line"), fingerprint(field="body")]
    (folder / "a.txt").write_bytes(b"one\r\ntwo\n\n \nthrEe\n")
    seen.append(fingerprint())
    (folder / "a.txt").rename(folder / "aa.txt")
    seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_the_fingerprint_does_not_depend_on_the_place(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "a.txt").write_bytes((folder / "a.txt").read_bytes())
    assert corpus(str(elsewhere / "a.txt")).fingerprint() == corpus(str(folder / "a.txt")).fingerprint()


def test_errors_of_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no corpus at .*nowhere"):
        corpus(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="a glob that matches"):
        corpus(str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match=r"no text in .*: no file ends in \.txt"):
        corpus(str(tmp_path))
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="the corpus is empty"):
        read(tmp_path)
    with pytest.raises(ValueError, match="choose one of 'file', 'line', 'paragraph'"):
        corpus(str(tmp_path), documents="word")
    with pytest.raises(ValueError, match=r"'body' is for \.jsonl files"):
        corpus(str(tmp_path), field="body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0", r"a\.txt: a binary file"),
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text":\n', r"a\.jsonl, line 2: broken JSON"),
        ("a.jsonl", b'\n\n{"body": "x", "n": 1}\n', r"a\.jsonl, line 3: no field 'text', it has 'body', 'n'"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1: no field 'text', it has no fields"),
        ("a.jsonl", b'{"text": 1}\n', r"a\.jsonl, line 1: field 'text' is int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: field 'text' .* surrogate"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', r"a\.jsonl, line 2: not UTF-8"),
    ],
)
def test_errors_of_content(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


RECORDS = b'{"text": "one"}\n{"text": "two\\u2028three"}\n'


@pytest.mark.parametrize("name", ["DATA.JSONL", "data.ndjson", "data.jsonl.gz", "a.JSONL.GZ", "a.jsonl.xz"])
def test_records_by_any_name(tmp_path, name):
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:].lower(), bytes)
    (tmp_path / name).write_bytes(pack(RECORDS))
    for place in (tmp_path / name, tmp_path):
        assert read(place) == ["one", "two\u2028three"]
        assert read(place, documents="line") == ["one", "two\u2028three"]


def test_a_list_of_records(tmp_path):
    (tmp_path / "a.JSON").write_text('[{"text": "one"}, {"text": "two", "n": 1}]')
    assert read(tmp_path / "a.JSON") == ["one", "two"]
    with pytest.raises(ValueError, match="no text in"):
        read(tmp_path)  # in folders .json files are seldom text


@pytest.mark.parametrize("name", ["a.txt.gz", "A.TXT.GZ", "a.md.bz2", "a.py.xz"])
def test_compressed_text(tmp_path, name):
    pack = {".gz": gzip.compress, "bz2": bz2.compress, ".xz": lzma.compress}[name[-3:].lower()]
    (tmp_path / name).write_bytes(pack(b"one\ntwo\n"))
    assert read(tmp_path / name) == read(tmp_path) == ["one\ntwo\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join(["one", "two\u2028\x85", "", "three", ""]).encode())
    assert read(tmp_path / "a.txt", documents="line") == ["one", "two\u2028\x85", "three"]
    assert read(tmp_path / "a.txt", documents="paragraph") == [f"one{end}two\u2028\x85", "three"]
    (tmp_path / "a.jsonl").write_bytes(end.join(['{"text": "one"}', '{"text": "two"}', ""]).encode())
    assert read(tmp_path / "a.jsonl") == ["one", "two"]


def test_a_final_line_end_is_no_empty_document(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with caplog.at_level("INFO", logger="absl"):
        assert read(tmp_path / "a.txt", documents="line") == ["one", "two"]
    assert "skipped" not in caplog.text


def test_empty_documents_are_reported_once(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    found = corpus(str(tmp_path / "a.txt"), documents="line")
    with caplog.at_level("INFO", logger="absl"):
        assert [list(found.documents()) for _ in range(3)] == [["one", "two"]] * 3
    assert caplog.text.count("skipped 1 empty documents, read 2") == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + "one\ufeff".encode())
    (tmp_path / "b.jsonl").write_bytes(mark + RECORDS + mark + b'{"text": "joined by cat"}\n')
    (tmp_path / "c.json").write_bytes(mark + b'[{"text": "listed"}]')
    assert read(tmp_path / "a.txt") == ["one\ufeff"]  # inside a text it is a character
    assert read(tmp_path / "b.jsonl") == ["one", "two\u2028three", "joined by cat"]
    assert read(tmp_path / "c.json") == ["listed"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"text": "one"}', r"a\.json: it holds no list of objects: .*\.jsonl"),
        ("a.json", RECORDS, r"a\.json: broken JSON: .*\.jsonl"),
        ("a.json", b'[{"body": 1}]', r"a\.json, record 1: no field 'text', it has 'body'"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-12], r"a\.txt\.gz: damaged"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: damaged"),
        ("a.txt.xz", b"no xz", r"a\.txt\.xz: damaged"),
        ("a.zip", b"PK", r"a\.zip: \.zip files can't be read: unpack"),
        ("a.tar.gz", b"", r"a\.tar\.gz: \.tar files can't be read"),
        ("a.PARQUET", b"PAR1", r"\.parquet files can't be read: .*convert"),
        ("text", gzip.compress(b"text" * 9, mtime=0), r"binary file .*: name it \.gz"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt: UTF-16: convert"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def python_docs():
    return corpus("python-docs")


def test_the_standard_library_is_real_text(python_docs):
    documents = list(python_docs.documents())
    assert sum(map(len, documents)) > 1_000_000
    assert documents == list(corpus("python-docs").documents())
    assert python_docs.fingerprint() == corpus("python-docs").fingerprint()
    by_name = {document.split("\n", 1)[0]: document for document in documents}
    assert "\ntextwrap.dedent\nRemove any common leading whitespace" in by_name["textwrap"]
    assert "\ntextwrap.TextWrapper.wrap\nwrap(text : string) -> [string]" in by_name["textwrap"]
    assert not any("site-packages" in name or ".test" in name for name in by_name)


def test_the_source_of_the_standard_library(python_docs):
    source = corpus("python-source")
    documents = list(source.documents())
    assert sum(map(len, documents)) > 5_000_000
    assert sum("def dedent(text):" in document for document in documents) == 1
    assert source.fingerprint() != python_docs.fingerprint()


def texts(n, start=0):
    return Texts(texts=tuple(f"document {i}" for i in range(start, start + n)))


def both(whole, holdout):
    train, valid = split(whole, holdout)
    return list(train.documents()), list(valid.documents())


def test_a_split_loses_and_repeats_nothing():
    train, valid = both(texts(2000), 0.1)
    assert sorted(train + valid) == sorted(texts(2000).texts)
    assert not set(train) & set(valid)
    assert 150 < len(valid) < 250


def test_a_split_moves_no_document():
    train, valid = both(texts(300), 0.2)
    more = [*texts(900).texts, *texts(300).texts]
    random.Random(0).shuffle(more)
    train_more, valid_more = both(Texts(texts=tuple(more)), 0.2)
    assert set(train) <= set(train_more)
    assert set(valid) <= set(valid_more)


def test_the_only_document_is_cut_at_its_end():
    text = json.dumps(list(range(5000)))
    train, valid = both(Texts(texts=(text,)), 0.1)
    edge = int(len(text) * 0.9)
    assert (train, valid) == ([text[:edge]], [text[edge:]])


def test_no_side_is_left_empty():
    for n in (2, 3, 4):
        for holdout in (1e-9, 1 - 1e-9):
            train, valid = both(texts(n), holdout)
            assert sorted(train + valid) == sorted(texts(n).texts)
            assert min(len(train), len(valid)) == 1
    assert both(texts(3), 1e-9) == tuple(sorted(side) for side in both(Texts(texts=texts(3).texts[::-1]), 1e-9))


def test_nothing_held_out():
    assert both(texts(5), 0.0) == (list(texts(5).texts), [])


def test_parts_have_their_own_fingerprints():
    for whole in (texts(9), texts(1)):
        parts = [part.fingerprint() for holdout in (0.3, 0.5) for part in split(whole, holdout)]
        assert len({*parts, whole.fingerprint()}) == 5
        assert parts == [part.fingerprint() for holdout in (0.3, 0.5) for part in split(whole, holdout)]


def test_a_long_reading_says_how_far_it_is(tmp_path, caplog, monkeypatch):
    (tmp_path / "text.txt").write_text("é" * 100_000 + "\n" + "b" * 100_000)
    monkeypatch.setattr(progress, "SECONDS", 0)
    with caplog.at_level("INFO", logger="absl"):
        train, _ = split(corpus(str(tmp_path), documents="line"), 0.5)
        train.fingerprint()
    assert "dividing the corpus: 2 documents, 0.2 million characters so far" in caplog.text
    assert "hashing files: 0.3 of 0.3 MB so far" in caplog.text


def test_impossible_splits():
    for holdout in (-0.1, 1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"not a fraction in \[0, 1\)"):
            split(texts(3), holdout)
    with pytest.raises(ValueError, match="all 3 documents are the same text"):
        split(Texts(texts=("a", "a", "a")), 0.5)
    with pytest.raises(ValueError, match=r"too few to hold out 0\.1"):
        split(Texts(texts=("a",)), 0.1)


def test_a_relative_path_says_from_where_it_is_looked_for(tmp_path, monkeypatch):
    """A run that is used from another folder than it was begun in."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"it is looked for from {tmp_path}")):
        Data(path="nowhere.txt").corpus()


def test_the_parts_of_the_only_document(tmp_path):
    (tmp_path / "text.txt").write_text("0123456789")
    train, valid = split(corpus(str(tmp_path / "text.txt")), 0.2)
    assert [list(part.documents()) for part in (train, valid)] == [["01234567"], ["89"]]
