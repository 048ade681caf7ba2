"""Records of prompts and answers: what is context, what is learned, what is cut, and what is refused in one line."""

import json
import logging

import numpy as np
import pytest

from diffusion_lm.data.huggingface_tokenizer import HuggingFaceTokenizer
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")
pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install -e '.[test]'")
TEMPLATE = """{% for m in messages %}<|start|>{{ m['role'] }}
{{ m['content'] | trim }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""
AR, WHOLE, BLOCKS, JOINT = AutoregressiveLoss(), ELBO(), BlockELBO(block_size=8), Joint(block_size=8)
OBJECTIVES = [AR, WHOLE, BLOCKS, JOINT]
CHAT = [("user", "one"), ("assistant", "two"), ("tool", "three"), ("assistant", "four")]


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def made(template=TEMPLATE):
    """A token for each byte, and four special ones."""
    model = tokenizers.models.BPE()
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<|pad|>", "<|text|>", "<|end|>", "<|start|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    found.train_from_iterator([], trainer)
    files = {
        "tokenizer.json": found.to_str().encode(),
        "tokenizer_config.json": json.dumps({"chat_template": template}).encode(),
    }
    return HuggingFaceTokenizer.from_files(files, vocab=260, mask=260, eos=[1, 2])


TOKENIZER = made()


@pytest.fixture
def opened(tmp_path):
    """(records, objective, **fields) -> the data, nothing held out."""

    def made(records, objective=AR, **fields):
        path = tmp_path / "records.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        fields = {"val_fraction": 0.0, "seq_len": 64, "tokenizer": TOKENIZER} | fields
        return PromptResponse(path=str(path), **fields).open(objective.layout)

    return made


def texts(batch, mask):
    """Each row's text under a mask."""
    shown = lambda ids: "".join(TOKENIZER.pieces(ids))  # noqa: E731
    return [shown(row[here]) for row, here in zip(batch.tokens, mask, strict=True)]


def only_batch(data, rows=1):
    return next(data.train_batches(length=data.data.seq_len, batch=rows, seed=0))


def test_a_prompt_is_context_and_its_completion_is_learned(opened):
    batch = only_batch(opened([{"prompt": "ab", "completion": "cd"}]))
    assert texts(batch, batch.context_mask) == ["ab"] and texts(batch, batch.loss_mask) == ["cd<|text|>"]
    assert texts(batch, batch.segment_ids == 0) == ["░" * 59]
    free = only_batch(opened([{"prompt": "", "completion": "cd"}]))
    assert texts(free, free.context_mask) == ["<|text|>"]  # something must come first


def test_a_pair_may_be_a_chat(opened):
    batch = only_batch(opened([{"prompt": "ab", "completion": "cd"}], chat=True))
    assert texts(batch, batch.context_mask) == ["<|start|>user\nab<|end|>\n<|start|>assistant\n"]
    assert texts(batch, batch.loss_mask) == ["cd<|end|>"]


def test_a_causal_row_learns_every_answer_of_a_chat(opened):
    batch = only_batch(opened([messages(*CHAT)], seq_len=128))
    whole = TOKENIZER.encode_chat(messages(*CHAT)["messages"], add_generation_prompt=False)
    text = batch.segment_ids[0] > 0
    assert batch.tokens[0][text].tolist() == whole[:-1].tolist()  # all but the last newline, which nothing follows
    assert texts(batch, batch.loss_mask) == ["two<|end|>four<|end|>"]
    assert (batch.context_mask == (batch.segment_ids > 0) & ~batch.loss_mask).all()


@pytest.mark.parametrize("objective", [WHOLE, BLOCKS, JOINT], ids=str)
def test_a_canvas_sees_nothing_behind_its_answer(opened, objective):
    """One example an answer, each in a segment or row of its own."""
    data = opened([messages(*CHAT)], objective, seq_len=128)
    examples = data.examples(next(data.corpus.documents()))
    assert [TOKENIZER.decode(e.tokens[e.targets]) for e in examples] == ["two", "four"]
    for example in examples:
        first = example.targets.argmax()
        assert example.targets[first:].all() and example.tokens[-1] == 2
    batch = only_batch(data, 2 if objective is WHOLE else 1)
    assert sorted(batch.segment_ids.max(axis=1)) == ([1, 1] if objective is WHOLE else [2])
    ends = ~batch.context_mask & ~batch.loss_mask & (batch.segment_ids > 0)
    assert (batch.tokens[ends] == TOKENIZER.eos).all() and ends.any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_records_share_rows_as_documents_of_their_own(opened, objective):
    records = [{"prompt": "p" * (1 + i % 5), "completion": "c" * (1 + i % 7)} for i in range(40)]
    data = opened(records, objective)
    rows = len(data.packed(data.corpus, 64, "x").rows)
    batch = only_batch(data, rows)
    canvas = objective.layout.canvas_length(64)
    found = []
    for i in range(rows):
        for number in range(1, batch.segment_ids[i].max() + 1):
            here = np.flatnonzero(batch.segment_ids[i] == number)
            assert (np.diff(here) == 1).all() and (batch.positions[i][here] == np.arange(len(here))).all()
            assert (here[-1] + 1) % canvas == 0
            answer = here[batch.loss_mask[i][here]]
            if objective is JOINT:
                assert answer[0] % canvas == 0  # where a sampler's canvas would begin
            found.append(
                ("".join(TOKENIZER.pieces(batch.tokens[i][here[batch.context_mask[i][here]]])), len(answer) - 1)
            )
    assert sorted(found) == sorted((r["prompt"], len(r["completion"])) for r in records)
    assert rows == 40 if objective is WHOLE else rows < 12


def test_what_is_cut_or_left_out_is_said_once(opened, caplog):
    long = [{"prompt": "p", "completion": "c" * 80}, {"prompt": "p" * 70, "completion": "c"}]
    with caplog.at_level(logging.WARNING):
        for objective in (AR, WHOLE, BLOCKS):
            data = opened([*long, {"prompt": "a", "completion": "b"}], objective)
            caplog.clear()
            batch = only_batch(data, 2)
            assert [r.getMessage() for r in caplog.records] == [
                "train part: data.seq_len=64 cuts 1 answers, and leaves out 1 whose prompts fill the row"
            ]
            assert sorted(texts(batch, batch.loss_mask)) == ["b<|text|>", "c" * 63]
    with pytest.raises(ValueError, match=r"no answer of the 2 train records fits into data\.seq_len=8"):
        only_batch(opened(long[1:] * 2, seq_len=8))


def test_an_answer_that_was_not_finished_has_no_end(opened):
    """Nobody knows what follows: no end of text is learned, and a canvas that isn't full is left out."""
    record = {"prompt": "a", "completion": "b" * 20, "finished": False}
    for objective, kept in ((AR, 20), (WHOLE, 20), (BLOCKS, 15), (JOINT, 16)):
        batch = only_batch(opened([record], objective))
        assert texts(batch, batch.loss_mask) == ["b" * kept]
        assert ((batch.loss_mask | batch.context_mask) == (batch.segment_ids > 0)).all()


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"prompt": "a"}, "a record has messages, or a prompt and its completion; this one has 'prompt'"),
        ([1], "this one has no keys"),
        ({"prompt": "a", "completion": " "}, "the completion is empty"),
        ({"prompt": 3, "completion": "b"}, "prompt is int, not text"),
        ({"prompt": "a", "completion": "\ud800"}, "half a surrogate pair"),
        ({"prompt": "a", "completion": "b", "finished": 1}, "finished is true or false"),
        ({"messages": "a"}, "messages is a list"),
        ({"messages": []}, "the last message isn't the assistant's"),
        (messages(("user", "a")), "the last message isn't the assistant's"),
        (messages(("assistant", "a")), "message 1: the assistant answers nothing"),
        (messages(("user", "a"), ("assistant", "")), "message 2: the answer is empty"),
        (messages(("human", "a"), ("assistant", "b")), "message 1: role 'human' is none of system, user"),
        (messages(("user", None), ("assistant", "b")), "message 1: content is NoneType, not text"),
    ],
)
def test_a_record_that_can_not_be_is_one_line_with_its_number(opened, record, cause):
    with pytest.raises(ValueError, match=r"records.jsonl, line 2") as raised:
        only_batch(opened([{"prompt": "a", "completion": "b"}, record]))
    assert cause in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_template_refuses_is_one_line(opened):
    refusing = made("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"roles must alternate; the record is .*messages") as raised:
        only_batch(opened([messages(*CHAT)], tokenizer=refusing))
    assert "\n" not in str(raised.value)
    other = made("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}")
    with pytest.raises(ValueError, match="shows message 2 otherwise than as an answer"):
        only_batch(opened([messages(*CHAT)], tokenizer=other))


def test_a_template_that_ends_no_turn_gets_an_end_of_text(opened):
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    plain = made(plain + "{% if add_generation_prompt %}assistant: {% endif %}")
    batch = only_batch(opened([messages(*CHAT[:2])], tokenizer=plain))
    assert texts(batch, batch.loss_mask) == ["two <|text|>"]


def test_the_text_of_a_control_token_ends_no_answer(opened):
    batch = only_batch(opened([messages(("user", "a<|end|>"), ("assistant", "b<|end|>c"))]))
    assert texts(batch, batch.loss_mask) == ["b<|end|>c<|end|>"]
    assert (batch.tokens == 2).sum() == 2 and (batch.tokens[batch.loss_mask] == 2).sum() == 1


def test_held_out_records_are_apart_and_batches_resume(opened):
    records = [{"prompt": str(i), "completion": str(i * i)} for i in range(50)]
    data = opened(records, val_fraction=0.3)
    kept = [{text for part in [side] for text in part.documents()} for side in data.parts]
    assert not kept[0] & kept[1] and len(kept[0]) + len(kept[1]) == 50 and len(kept[1]) > 5
    valid = list(data.valid_batches(length=64, batch=2))
    assert sum(batch.loss_mask.sum() for batch in valid) == data.valid.targets
    first = data.train_batches(length=64, batch=2, seed=3)
    next(first)
    state = json.loads(json.dumps(first.get_state()))
    again = data.train_batches(length=64, batch=2, seed=3)
    again.set_state(state)
    expected = [next(first) for _ in range(4)]
    assert all((next(again).tokens == batch.tokens).all() for batch in expected)
    shares = [data.train_batches(length=64, batch=2, seed=3, mine=[row]) for row in (0, 1)]
    for share in shares:
        share.set_state(state)
    for row, share in enumerate(shares):
        assert (next(share).tokens == expected[0].tokens[[row]]).all()


def test_other_data_or_no_tokenizer_is_refused(opened):
    with pytest.raises(ValueError, match=r"one record, and none can be held out: set data\.val_fraction=0"):
        only_batch(opened([{"prompt": "a", "completion": "b"}], val_fraction=0.5))
    with pytest.raises(ValueError, match=r"data\.tokenizer is not set"):
        opened([{"prompt": "a", "completion": "b"}], tokenizer=None)
    data = opened([{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="not what the checkpoint was trained on"):
        data.data.open(AR.layout, fingerprint="other")
