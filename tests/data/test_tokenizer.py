"""A tokenizer gives every text back, and says plainly when it can't be had."""

import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lm.data import tokenizer as module
from diffusion_lm.data.tokenizer import (
    SentencePiece,
    decode_continuation,
    encode_continuation,
    encode_prompt,
    lossless,
    token_texts,
    train_tokenizer,
)

DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices(["ka", "lo", "mi", "ren", "st", "tu"], k=DRAW.randint(1, 4))) for _ in range(400)]
PROSE = [
    "It was a bright cold day in April, and the clocks were striking thirteen.\n",
    "def f(x):\n    if x:\n        return x + 1\n\n\treturn 2\n",
    "Schöne Grüße aus Köln – and   many   spaces.\r\n",
    *(" ".join(DRAW.choices(WORDS, k=12)) for _ in range(100)),
]
AWKWARD = [
    "",
    " ",
    "  a  b ",
    "\n\n\n  x",
    "a\tb\t\t",
    "\r\n",
    "\r",
    "a\0b",
    "▁",
    "▁a▁▁b",
    "▅",
    "⁇",
    "\ufeff",
    "\ufffd",
]
AWKWARD += ["👩‍👧é\u0301", "<s></s><unk>", "<0x0A>", "\U0010ffff", "\x1c\x85\u2028"]


@pytest.fixture(scope="module", params=["unigram", "char"])
def tokenizer(request):
    return train_tokenizer(PROSE, vocab=330, kind=request.param)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_text_comes_back(tokenizer, data):
    text = data.draw(st.text() | st.text(alphabet="a ▁\n\r\t\0x0é<>s/"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [*AWKWARD, *PROSE[:3]])
def test_awkward_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert not set(ids.tolist()) & {tokenizer.bos, tokenizer.eos, tokenizer.unknown}
    assert tokenizer.decode(ids) == text


def test_ids(tokenizer):
    assert tokenizer.mask == tokenizer.vocab
    assert set(tokenizer.suppressed) == {tokenizer.unknown, tokenizer.bos}
    assert tokenizer.eos not in tokenizer.suppressed
    assert np.all(tokenizer.encode("".join(PROSE)) < tokenizer.vocab)


def test_control_pieces_write_nothing_and_a_mask_cannot_be_written(tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode("a day"), tokenizer.eos]
    assert tokenizer.decode(ids) == "a day"
    with pytest.raises(ValueError, match="is the mask"):
        tokenizer.decode([*ids, tokenizer.mask])
    for wrong in (-1, tokenizer.vocab + 1):
        with pytest.raises(ValueError, match="none of the"):
            tokenizer.decode([wrong])
        with pytest.raises(ValueError, match="none of the"):
            tokenizer.pieces([wrong])


def test_pieces_show_spaces_bytes_and_masks(tokenizer):
    ids = tokenizer.encode("a day")
    assert "".join(tokenizer.pieces(ids)) == "a day"
    assert tokenizer.pieces(tokenizer.encode("☃")) == [r"\xe2", r"\x98", r"\x83"]
    assert tokenizer.pieces([tokenizer.mask]) == ["░"]


def test_the_text_of_a_token(tokenizer):
    """A byte that is a character writes it, and no byte writes the x that shows it."""
    texts = token_texts(tokenizer)
    byte, snow = texts.index("\0"), tokenizer.encode("☃")
    assert texts[byte + ord("a")] == "a" and texts[snow[0]] == "\ufffd"
    assert [i for i, text in enumerate(texts[byte : byte + 256]) if "x" in text] == [ord("x")]
    assert [texts[i] for i in tokenizer.encode("a day")] == tokenizer.pieces(tokenizer.encode("a day"))


def test_the_same_text_gives_the_same_tokenizer(tokenizer):
    again = SentencePiece(proto=tokenizer.proto)
    assert again == tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.encode("a day"), tokenizer.encode("a day"))
    first = train_tokenizer(iter(PROSE), vocab=320)
    assert first == train_tokenizer(PROSE, vocab=320)
    assert first.fingerprint != train_tokenizer(PROSE, vocab=321).fingerprint


def test_a_saved_model_is_read_back(tokenizer, tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(tokenizer.proto)
    assert SentencePiece.load(path) == tokenizer


def test_characters_are_pieces(shared):
    text = (shared / "data/text/tinyshakespeare.txt").read_text()
    tokenizer = train_tokenizer([text], vocab=512, kind="char")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert len(np.unique(ids)) == len(set(text)) == 65
    assert tokenizer.vocab == 3 + 256 + 65
    assert tokenizer.decode(ids) == text


def test_unigram_has_the_size_asked_for_and_is_shorter_than_characters():
    tokenizer = train_tokenizer(PROSE, vocab=330)
    assert tokenizer.vocab == 330
    assert len(tokenizer.encode(PROSE[5])) < len(PROSE[5]) / 2


def test_runs_of_spaces_are_pieces():
    code = [f"class C{i}:\n        value_{i} = {i}\n" for i in range(50)]
    tokenizer = train_tokenizer(code, vocab=300)
    assert len(tokenizer.encode(" " * 8)) < 8


def test_char_vocabulary_is_bounded():
    assert train_tokenizer(["abcdefgh" * 9], vocab=262, kind="char").vocab == 262
    assert train_tokenizer(["abcdefgh" * 9], vocab=999, kind="char").vocab == 259 + 8 + 1  # and a space


def test_training_uses_lines_at_even_distances(monkeypatch):
    lines = [chr(0x4E00 + i) * 10 for i in range(64)]  # 30 bytes each
    monkeypatch.setattr(module, "SAMPLE_BYTES", 300)
    monkeypatch.setattr(module, "BYTES_PER_TOKEN", 0)
    tokenizer = train_tokenizer(lines, vocab=400, kind="char")
    own = [i for i, line in enumerate(lines) if len(tokenizer.encode(line)) == len(line)]
    assert own == list(range(0, 64, 8))


@pytest.mark.parametrize("size", [1, 7, 50])
def test_long_texts_are_encoded_in_chunks_alike(tokenizer, monkeypatch, size):
    text = "".join(PROSE[:20]) + "\n\n  ▁ \r\n" + "x" * 60 + "\n"
    assert lossless(tokenizer)
    whole = tokenizer.encode(text)
    monkeypatch.setattr(module, "CHUNK_CHARS", size)
    monkeypatch.setattr(module, "SLICE_CHARS", size)
    assert tokenizer.encode(text).tolist() == whole.tolist()


def test_long_lines_are_not_skipped():
    text = "abc " * 5000
    tokenizer = train_tokenizer([text], vocab=300, kind="char")
    assert len(tokenizer.encode(text)) == len(text)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"too small for 2048 tokens: set vocab_size to at most (\d+)") as error:
        train_tokenizer(PROSE, vocab=2048)
    most = int(str(error.value).split()[-1])
    assert train_tokenizer(PROSE, vocab=most).vocab == most
    with pytest.raises(ValueError, match="too few for this text's characters: set vocab_size to at least") as error:
        train_tokenizer(PROSE, vocab=270)
    least = int(str(error.value).split()[-1])
    assert train_tokenizer(PROSE, vocab=least).vocab == least
    with pytest.raises(ValueError, match="bytes and control tokens alone are 259"):
        train_tokenizer(PROSE, vocab=100, kind="char")
    with pytest.raises(ValueError, match="choose 'unigram' or 'char'"):
        train_tokenizer(PROSE, vocab=300, kind="bpe")
    for empty in ([], [""], ["\n\r\n"], ["\0"]):
        with pytest.raises(ValueError, match="no text to train"):
            train_tokenizer(empty, vocab=300)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SentencePiece.load(tmp_path / "nowhere.model")
    (tmp_path / "bad.model").write_bytes(b"\xff not a model")
    with pytest.raises(ValueError, match=r"bad\.model: not a SentencePiece model"):
        SentencePiece.load(tmp_path / "bad.model")


def _model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE), model_writer=model, vocab_size=80, minloglevel=2, **options
    )
    return model.getvalue()


def test_models_of_others():
    tokenizer = SentencePiece(proto=_model(pad_id=3, control_symbols=["<turn>"]))
    assert set(tokenizer.pieces(tokenizer.suppressed)) == {"<unk>", "<s>", "<pad>", "<turn>"}
    assert tokenizer.decode([tokenizer.bos, 3, *tokenizer.encode("the day"), tokenizer.eos]) == "the day"
    without = SentencePiece(proto=_model(bos_id=-1))
    assert without.bos == without.eos
    assert without.pieces(without.suppressed) == ["<unk>"]
    with pytest.raises(ValueError, match="no end-of-text token"):
        SentencePiece(proto=_model(eos_id=-1))


def test_the_reference_model(shared):
    tokenizer = SentencePiece.load(shared / "data/tokenizers/sp_test_model_1000.model")
    assert (tokenizer.vocab, tokenizer.mask, tokenizer.bos, tokenizer.eos) == (1000, 1000, 1, 2)
    assert tokenizer.suppressed == (0, 1)
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"


# ---- prompts and what follows them ----


@pytest.fixture(scope="module")
def normalising():
    return SentencePiece(proto=_model(normalization_rule_name="nmt_nfkc"))


def test_a_continuation_keeps_its_first_space(normalising):
    prompt, ids = [normalising.bos, *normalising.encode("It was")], normalising.encode("the day")
    assert normalising.decode(ids) == "the day"
    assert decode_continuation(normalising, prompt, ids) == " the day"
    assert decode_continuation(normalising, [normalising.bos], ids) == "the day"
    assert decode_continuation(normalising, prompt, []) == ""


@pytest.mark.parametrize("text", ["the day", " the day", "ing", ".", " "])
def test_a_text_that_follows_another_gets_no_space(normalising, tokenizer, text):
    """Encoded alone, `normalising` puts a space before it; it drops a space that stands alone."""
    for one in (tokenizer, normalising):
        ids = encode_continuation(one, text)
        kept = "" if one is normalising and text == " " else text
        assert decode_continuation(one, one.encode("It was"), ids) == kept
    assert np.array_equal(encode_continuation(tokenizer, text), tokenizer.encode(text))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.text(), st.text())
def test_a_continuation_of_a_lossless_tokenizer_is_its_text(tokenizer, prompt, text):
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    assert decode_continuation(tokenizer, ids, [*tokenizer.encode(text), tokenizer.eos]) == text


def test_a_prompt_may_end_inside_a_character(tokenizer):
    first, *rest = tokenizer.encode("☃")
    assert decode_continuation(tokenizer, [first], rest) == "☃"


def test_lossless(tokenizer, normalising):
    assert lossless(tokenizer) and not lossless(normalising)


def test_prompts_are_encoded_or_refused(tokenizer, normalising, caplog):
    assert np.array_equal(encode_prompt(tokenizer, "It  was Ж\n"), tokenizer.encode("It  was Ж\n"))
    assert np.array_equal(encode_prompt(normalising, "It was"), normalising.encode("It was"))
    assert not caplog.records
    with caplog.at_level("WARNING", logger="absl"):
        encode_prompt(normalising, "It  was\n")
    assert repr("It  was\n") in caplog.text and "the model sees 'It was'" in caplog.text
    with pytest.raises(ValueError, match="no token for 'Ж☃' in 'a Ж b ☃'"):
        encode_prompt(normalising, "a Ж b ☃")
    with pytest.raises(ValueError, match="not valid UTF-8"):
        encode_prompt(tokenizer, "caf\udce9")


@pytest.mark.parametrize("vocab", [1, 3, 100])
@pytest.mark.parametrize("kind", ["unigram", "char"])
def test_a_vocabulary_that_is_too_small_is_one_line(vocab, kind):
    with pytest.raises(ValueError, match="too few") as error:
        train_tokenizer(PROSE, vocab=vocab, kind=kind)
    assert ".cc" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["char", "unigram"])
def test_a_space_comes_back_where_the_training_text_had_none(kind):
    """SentencePiece would spell it in the bytes of its own sign for a space."""
    text = " a b  c▁\n"
    tokenizer = train_tokenizer(["abc\nacb"] * 3, vocab=264, kind=kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text
