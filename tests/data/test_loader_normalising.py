"""Text that a tokenizer changes: counted once, shown with an example, and scored as it is spelled."""

import io
import json

import pytest
import sentencepiece
from absl import logging

from diffusion_lm.data.corpora import Texts
from diffusion_lm.data.loader import tokenize
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.data.tokenizer import SentencePiece
from diffusion_lm.layouts import NoCanvas


@pytest.fixture(scope="module")
def normalising():
    """SentencePiece as its documentation trains it: NFKC, a space before the text, no double spaces, no line ends."""
    model = io.BytesIO()
    lines = ["Return the list of the values.", "Return a list.", "the value of a list", "Return the value"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=45, hard_vocab_limit=False, minloglevel=2
    )
    return SentencePiece(proto=model.getvalue())


def test_text_that_a_tokenizer_changes_is_counted_as_it_is_scored(normalising, caplog):
    logging.set_verbosity(logging.INFO)
    changed, same = "Return  the\n\nlist", "Return a list"
    with caplog.at_level("INFO", logger="absl"):
        found = tokenize(Texts(texts=(changed, same, changed)), normalising, pad=0)
    assert found.changed == 2
    assert found.characters == found.bytes == 2 * len("Return the list") + len(same)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the tokenizer changes 2 of 3 documents" in said and "'Return the list'" in said
    assert repr(changed) in said


def test_text_without_a_token_counts_no_bytes(normalising):
    found = tokenize(Texts(texts=("the Ж list",)), normalising, pad=0)
    assert found.unknown == found.changed == 1
    assert found.bytes == len("the  list") and found.bytes < len("the Ж list".encode())


def test_a_kept_file_keeps_the_count_of_changes(normalising, tmp_path):
    path, corpus = tmp_path / "tokens.npy", Texts(texts=("Return  the list", "Return a list"))
    first, again = (tokenize(corpus, normalising, pad=0, path=path) for _ in range(2))
    assert first.changed == again.changed == 1 and first.bytes == again.bytes


def test_a_completion_follows_its_prompt(normalising, tmp_path, caplog):
    """No space between them that the record doesn't have; what the tokenizer changes is said."""
    path, pairs = tmp_path / "pairs.jsonl", [("Return", " the list"), ("Return", "s a"), ("Return  a", " list")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    data = PromptResponse(path=str(path), val_fraction=0.0, tokenizer=normalising).open(NoCanvas())
    with caplog.at_level("WARNING", logger="absl"):
        packed = data.packed(data.corpus, 32, "train")
    texts = [normalising.decode(example.tokens) for example in packed.examples]
    assert texts == ["Return the list", "Returns a", "Return a list"]
    assert packed.bytes == len(" the list") + len("s a") + len(" list")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "the tokenizer changes 1 prompts and completions (such as 'Return  a' to 'Return a')" in said
