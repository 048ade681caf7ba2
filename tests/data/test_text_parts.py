"""A text in parts is the same text wherever it is cut: files, documents, lines, tokens; and long ones stay on disk."""

import io
import itertools
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from diffusion_lm.data import text_parts
from diffusion_lm.data import tokenizer as tokenizers
from diffusion_lm.data.corpora import Corpus, Texts, corpus, document_parts, split
from diffusion_lm.data.text_parts import cut, decode, parts_of, whole_lines
from diffusion_lm.data.tokenizer import SentencePiece, encode_parts, lossless, train_tokenizer

END = r"(?>\r\n|\r|\n)"
SPLITS = {"line": END, "paragraph": rf"{END}(?:[ \t]*{END})+"}
WORDS = ["It", "was", "a", "day", "of", "rain", "and", "the", "ship", "left", "at", "four", "with", "letters", "for"]
PROSE = "".join(f"{' '.join(WORDS[i % 7 : i % 17])}\n\n  é▁ {WORDS[i % 19 % 15]}\r\n文\t\n" for i in range(90))


@st.composite
def texts(draw):
    return "".join(draw(st.lists(st.sampled_from(["a", "é 文", "😀", " ", "\t", "\r", "\n", "\r\n", "\u2028", "▁"]))))


@st.composite
def in_parts(draw):
    """(a text, its parts)."""
    text = draw(texts())
    at = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=6))})
    return text, [text[a:b] for a, b in itertools.pairwise(at)]


@pytest.fixture(params=[2, 3, 50])
def part(request, monkeypatch):
    """Bytes that are read at a time."""
    monkeypatch.setattr(text_parts, "PART", request.param)
    return request.param


def test_a_file_is_its_text(part, tmp_path):
    path, text = tmp_path / "a.txt", "aé文😀\r\n\ufeffb"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + text.encode())
        assert "".join(parts_of(path)) == text
        assert all(len(piece.encode()) <= part + 3 for piece in parts_of(path))
    path.write_bytes(b"")
    assert list(parts_of(path)) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ab\xc3\xa9\xff", r"not UTF-8 \(byte 4\)"),
        (b"abc\xe6\x96", r"not UTF-8 \(byte 3\)"),  # the file ends inside a character
        (b"abc\0", "a binary file"),
        ("ab".encode("utf-16"), "UTF-16|binary"),
    ],
)
def test_a_file_that_is_no_text_names_its_byte(part, tmp_path, data, message):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(parts_of(path))
    with pytest.raises(ValueError, match=message):
        decode(path, data)


@pytest.mark.parametrize("unit", SPLITS)
@given(case=in_parts())
def test_documents_of_a_text(unit, case):
    text, parts = case
    expected = [document.strip("\r\n") for document in re.split(SPLITS[unit], text)]
    if len(expected) > 1 and not expected[-1]:
        expected.pop()
    assert ["".join(document) for document in cut(parts, unit)] == expected


@given(case=in_parts(), size=st.integers(1, 9))
def test_whole_lines(case, size):
    text, parts = case
    found = list(whole_lines(parts, size))
    assert "".join(found) == text and found == list(whole_lines([text] if text else [], size))
    assert all(piece.endswith("\n") for piece in found[:-1])
    assert all(len(piece) <= size or "\n" not in piece[:-1] or piece == text for piece in found)
    assert len(found) <= 1 or len(text) > size


class InParts(Texts):
    """A corpus with document_parts, of one character each."""

    def document_parts(self):
        return map(iter, self.texts)


@pytest.mark.parametrize("count", [1, 40])
def test_a_split_of_documents_in_parts(count):
    whole = tuple(f"the document {i}ä 文 and some more of it" for i in range(count))
    sides: list[list[Corpus]] = [list(split(kind(texts=whole), 0.3)) for kind in (Texts, InParts)]
    expected = [list(side.documents()) for side in sides[0]]
    assert all(expected) and len("".join(itertools.chain(*expected))) == len("".join(whole))
    for side, texts in zip(sides[1], expected, strict=True):
        assert list(side.documents()) == ["".join(parts) for parts in document_parts(side)] == texts
    assert [a.fingerprint() for a in sides[0]] == [b.fingerprint() for b in sides[1]]


def test_a_corpus_that_changes_after_its_split_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(20)))
    train, _ = split(corpus(str(path), documents="line"), 0.2)
    path.write_text("line 1\n")
    with pytest.raises(ValueError, match="more or fewer documents than when it was divided"):
        list(train.documents())


@pytest.fixture(scope="module", params=["unigram", "char"])
def tokenizer(request):
    return train_tokenizer([PROSE], vocab=300, kind=request.param)


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_tokens_of_a_text(tokenizer, monkeypatch, limit):
    assert lossless(tokenizer)
    whole = tokenizer.encode(PROSE)
    for name in ("CHUNK_CHARS", "SLICE_CHARS"):
        monkeypatch.setattr(tokenizers, name, limit)
    for size in (1, 10, 1000, len(PROSE)):
        parts = [PROSE[i : i + size] for i in range(0, len(PROSE), size)]
        found = list(encode_parts(tokenizer, iter(parts)))
        assert len(found) > 1 and np.concatenate(found).tolist() == whole.tolist()


def test_characters_are_cut_only_where_no_token_holds_two():
    """Two letters that a user defined as one token stay one, wherever the text is cut."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROSE]), model_writer=model, model_type="char", vocab_size=310, minloglevel=2,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, byte_fallback=True,
        hard_vocab_limit=False, user_defined_symbols=["\n", "\r", "sh"],
    )  # fmt: skip
    tokenizer = SentencePiece(proto=model.getvalue())
    assert np.concatenate([*encode_parts(tokenizer, iter(PROSE))]).tolist() == tokenizer.encode(PROSE).tolist()
    assert "sh" in tokenizer.pieces(tokenizer.encode(PROSE))


@pytest.mark.parametrize("size", [1, 3, 30, 3000])
@pytest.mark.parametrize("kind", ["unigram", "char"])
def test_a_tokenizer_of_texts_in_parts(monkeypatch, kind, size):
    monkeypatch.setattr(tokenizers, "LINE_CHARS", 7)
    text = PROSE + "x\0y" * 40
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert train_tokenizer([iter(parts)], vocab=290, kind=kind) == train_tokenizer([text], vocab=290, kind=kind)
