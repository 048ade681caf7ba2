"""Text as it is written: pieces join to the whole, no character is cut, and passes lead to what `run` returns."""

import io
import itertools
import types

import jax
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_samplers import NEVER, TEXT_SAMPLERS, autoregressive, prompts
from support.tiny import MASK, model

from diffusion_lm.data.tokenizer import SentencePiece, decode_continuation
from diffusion_lm.inference import runner
from diffusion_lm.inference.streaming import Answer
from diffusion_lm.samplers.base import AUTOREGRESSION, DIFFUSION, DRAFT
from diffusion_lm.samplers.drafters import PromptLookup
from diffusion_lm.samplers.speculative import Speculative

END = 256
BYTES = types.SimpleNamespace(
    stops=(END,), decode=lambda ids: bytes(int(i) for i in ids if i < END).decode(errors="replace")
)


def pieces(ids, cuts, stop=(), max_tokens=99):
    answer, given = Answer(BYTES, np.frombuffer(b"a\xc3", np.uint8).astype(np.int32), max_tokens, stop), []
    for end in [*sorted({min(cut, len(ids)) for cut in cuts} - {len(ids)}), len(ids)]:
        given.append(answer.update(np.asarray(ids[:end], np.int32), end == len(ids)))
        if answer.finish_reason:
            break
    assert "".join(given) == answer.text
    return given, answer


@given(st.lists(st.integers(0, 255), max_size=40), st.lists(st.integers(0, 40), max_size=10))
@settings(max_examples=200, deadline=None)
def test_pieces_of_any_bytes_join_to_the_whole(ids, cuts):
    whole = decode_continuation(BYTES, np.array([97, 0xC3]), ids)
    assert pieces(ids, cuts)[1].text == whole


@given(
    st.text(max_size=12),
    st.lists(st.integers(0, 40), max_size=10),
    st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_no_character_is_cut_and_nothing_from_a_stop_string_on_is_shown(text, cuts, stop):
    text = "\u00e9" + text.encode(errors="ignore").decode()  # the prompt ends within the first character
    given, answer = pieces(list(text.encode()[1:]), cuts, stop)
    found = min((text.find(s) for s in stop if s in text), default=None)
    assert answer.text == text[:found] and answer.finish_reason == "stop"
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in given)


@pytest.mark.parametrize("spaces", [0, 1, 40])
def test_pieces_of_a_tokenizer_that_drops_first_spaces_join_to_the_whole(spaces):
    """SentencePiece's defaults: a word's space is lost where it is decoded alone, and after spaces alone."""
    model, words = io.BytesIO(), ["Return the list of the values.", "the value of a list"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=45, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = SentencePiece(proto=model.getvalue())
    ids = [*tokenizer.encode("the"), *[tokenizer.encode("a ")[0]] * spaces, *tokenizer.encode("value of the list")]
    answer = Answer(tokenizer, np.array([tokenizer.bos, *tokenizer.encode("Return")]), 99)
    pieces = [answer.update(np.asarray(ids[:end]), end == len(ids)) for end in range(1, len(ids) + 1)]
    assert "".join(pieces) == answer.text == " the" + " " * spaces + " value of the list"


def test_an_answer_ends_at_an_end_token_or_at_its_length():
    assert pieces([97, 98, END, 99], [2])[1].text == "ab"
    answer = pieces([97] * 9, range(9), max_tokens=4)[1]
    assert answer.text == "aaaa" and answer.finish_reason == "length" and len(answer.ids) == 4


def speculative(eos):
    draw = autoregressive(eos, temperature=0.0).sampling
    return Speculative(drafter=PromptLookup(num_tokens=2), mask=MASK, eos=eos, sampling=draw)


KINDS = {**TEXT_SAMPLERS, "drafts": speculative}


def watched(text_sampler, prompt, length, leave=()):
    """All snapshots; the rows in `leave` are given up at the snapshot of that number."""
    keys, wanted = jax.random.split(jax.random.key(0), len(prompt.length)), np.ones(len(prompt.length), bool)
    shown = []
    for snapshot in runner.snapshots(text_sampler, model(), prompt, keys, max_new_tokens=length, wanted=wanted):
        shown.append(snapshot)
        for row, number in leave:
            wanted[row] &= len(shown) < number
    return shown


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", KINDS)
def test_passes_lead_to_the_generation(name):
    text_sampler, prompt = KINDS[name](eos=NEVER), prompts([6, 1, 3, 2])
    keys = jax.random.split(jax.random.key(0), 4)
    whole = runner.run(text_sampler, model(), prompt, keys, max_new_tokens=10)
    shown = watched(text_sampler, prompt, 10)
    assert (shown[-1].tokens == whole.tokens).all() and shown[-1].nfe == whole.nfe
    assert np.allclose(shown[-1].confidence, whole.confidence, atol=1e-5) and (whole.confidence > 0).all()
    assert (shown[-1].writer == whole.writer).all()
    for before, after in itertools.pairwise(shown):
        assert (before.length <= after.length).all() and before.nfe <= after.nfe
        for row, count in enumerate(before.length):  # final is final
            assert (before.tokens[row, :count] == shown[-1].tokens[row, :count]).all()
    writers = set(np.unique(whole.writer))
    assert writers <= {
        "autoregressive": {AUTOREGRESSION}, "drafts": {AUTOREGRESSION, DRAFT}, "auto": {0, 1, 2}
    }.get(name, {DIFFUSION})  # fmt: skip
    if name == "drafts":
        assert DRAFT in writers
    if name == "confidence":  # a canvas clears up: the first pass leaves masks
        undecided = [(s.tokens == MASK).sum() for s in shown]
        assert undecided[:2] == [40, 32] and undecided[-1] == 0  # 2 of 4 in each row


@pytest.mark.parametrize("name", ["autoregressive", "confidence"])
def test_rows_that_are_not_wanted_leave_and_the_others_do_not_notice(name, monkeypatch):
    sizes = []
    step = runner._one_step if name == "autoregressive" else runner._begin_canvas

    def noted(network, state, *rest, stage):
        sizes.append(len(state.finished))
        return step(network, state, *rest, stage=stage)

    monkeypatch.setattr(runner, step.__name__, noted)
    text_sampler, prompt = KINDS[name](eos=NEVER), prompts([6, 1, 3, 2])
    whole = watched(text_sampler, prompt, 10)[-1]
    sizes.clear()
    shown = watched(text_sampler, prompt, 10, leave=[(0, 2), (2, 2)])
    assert sizes[0] == 4 and sizes[-1] == 2
    assert (shown[-1].tokens[[1, 3]] == whole.tokens[[1, 3]]).all()
    assert len(watched(text_sampler, prompt, 10, leave=[(row, 3) for row in range(4)])) <= 4  # nobody is left
