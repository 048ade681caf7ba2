"""Rows of a task: context and loss masks, where canvases begin, and batches that don't depend on hosts or workers."""

import json

import numpy as np
import pytest

from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.planning.data import Examples, char_tokenizer, min_seq_len
from diffusion_lm.planning.tasks import base
from diffusion_lm.planning.tasks.base import Example
from diffusion_lm.planning.tasks.countdown import Countdown
from diffusion_lm.planning.tasks.path import PathPlanning
from diffusion_lm.planning.tasks.queens import Queens
from diffusion_lm.planning.tasks.satisfiability import Satisfiability
from diffusion_lm.planning.tasks.sudoku import Sudoku

TASK = Countdown(numbers=3)
TESTED = Example("2,3,5,11", "2*3=6,5+6=11")
OBJECTIVES = [
    AutoregressiveLoss(),
    ELBO(),
    BlockELBO(block_size=8),
    BlockELBO(block_size=8, clean="causal"),
    Joint(block_size=8),
    Joint(block_size=22),
]


def source(objective=None, task=TASK, extra=0, **data):
    objective = objective or ELBO()
    return Examples(task=task, seq_len=min_seq_len(task, objective.layout) + extra, **data).open(objective.layout)


def drawn(found, number, *, batch=4, seed=0, mine=None, start=0):
    batches = found.train_batches(length=found.data.seq_len, batch=batch, seed=seed, mine=mine)
    batches.set_state({"next_batch": start})
    return [next(batches) for _ in range(number)]


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "task",
    [TASK, PathPlanning(), Queens(), Satisfiability(), Satisfiability(variables=9), Sudoku(size=4, least=4, most=8)],
    ids=str,
)
def test_each_character_is_a_token_and_back(task):
    tokenizer = char_tokenizer(task.alphabet)
    assert tokenizer.vocab == len(set(task.alphabet)) + 3 < 128
    for one in (base.example(task, 0, i) for i in range(20)):
        for text in one:
            assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == len(text)
        (row,) = source(task=task).rows(400)([one]).tokens
        ids = [tokenizer.bos, *tokenizer.encode(one.prompt), *tokenizer.encode(one.answer), tokenizer.eos]
        assert row[: len(ids)].tolist() == ids


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_prompt_is_context_and_the_answer_has_a_loss(objective):
    found = source(objective)
    (batch,) = drawn(found, 1, batch=50)
    tokenizer = found.tokenizer
    for i in range(50):
        text = batch.segment_ids[i] == 1
        begin = text.argmax()
        assert batch.tokens[i, begin] == tokenizer.bos
        assert text[begin:][: text.sum()].all(), "contiguous"
        assert (batch.positions[i][text] == np.arange(text.sum())).all()
        prompt = tokenizer.decode(batch.tokens[i][batch.context_mask[i]])
        answered = batch.tokens[i][batch.loss_mask[i]]
        assert answered[-1] == tokenizer.eos and (answered == tokenizer.eos).sum() == 1
        assert TASK.verify(prompt, tokenizer.decode(answered))
        rest = text & ~batch.context_mask[i] & ~batch.loss_mask[i]
        assert (batch.tokens[i][rest] == tokenizer.eos).all() and (batch.tokens[i][~text] == tokenizer.mask).all()
        assert not (batch.context_mask[i] & batch.loss_mask[i]).any() and not batch.context_mask[i][~text].any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_canvases_lie_where_the_sampler_puts_them(objective):
    """After a causal prompt a canvas begins with the answer; block-causal canvases count from the begin of text; the
    whole row is one canvas. Every canvas that begins is full."""
    (batch,) = drawn(source(objective), 1, batch=50)
    layout = objective.layout
    canvas = layout.canvas_length(batch.tokens.shape[1])
    aligned = layout.denoises and layout.align == 1
    for given, segment_ids in zip(batch.context_mask, batch.segment_ids, strict=True):
        first = given.nonzero()[0]
        assert (first[-1] + 1) % canvas == 0 if aligned else first[0] == 0
        assert (segment_ids.nonzero()[0][-1] + 1) % canvas == 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_min_seq_len_is_the_least_that_fits(objective):
    needed = min_seq_len(TASK, objective.layout)
    prompt, answer = TASK.max_lengths
    canvas = objective.layout.canvas_length(needed)
    rows = source(objective).rows(needed)
    assert rows([Example("1" * prompt, "1" * answer)]).loss_mask[0, -canvas:].any()
    with pytest.raises(ValueError, match=f"set it to {needed}"):
        source(objective, extra=-1)
    assert needed % canvas == 0


def test_resumes_to_the_same_batches():
    found = source()
    batches = found.train_batches(length=found.data.seq_len, batch=4, seed=0)
    before = [next(batches) for _ in range(3)]
    state = json.loads(json.dumps(batches.get_state()))
    after = [next(batches) for _ in range(3)]
    again = found.train_batches(length=found.data.seq_len, batch=4, seed=0)
    next(again)  # batches generated ahead are dropped
    again.set_state(state)
    assert all((next(again).tokens == batch.tokens).all() for batch in after)
    assert len({batch.tokens.tobytes() for batch in before + after}) == 6
    with pytest.raises(ValueError, match="new workdir"):
        again.set_state({"epoch": 3})


def test_hosts_together_have_the_batch_of_one():
    found = source()
    shares = [(0, 1), (2, 5), (3, 4)]
    parts = [drawn(found, 2, batch=6, mine=mine) for mine in shares]
    for number, whole in enumerate(drawn(found, 2, batch=6)):
        for mine, part in zip(shares, parts, strict=True):
            assert np.array_equal(part[number].tokens, whole.tokens[list(mine)])


def test_worker_processes_generate_what_a_thread_does():
    one, many = drawn(source(), 2), drawn(source(workers=1), 2)
    assert all((a.tokens == b.tokens).all() for a, b in zip(one, many, strict=True))


def test_seeds_differ():
    (one,), (other,) = drawn(source(), 1), drawn(source(), 1, seed=1)
    assert (one.tokens != other.tokens).any()


def test_a_test_file_is_kept_out_of_training(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"input": TESTED.prompt, "output": TESTED.answer}))
    leaks = []
    for test in (None, str(path)):
        found = source(test=test)
        (batch,) = drawn(found, 1, batch=1500)
        texts = [
            found.tokenizer.decode(row[given]) for row, given in zip(batch.tokens, batch.context_mask, strict=True)
        ]
        leaks.append(sum(TASK.split_key(Example(text, "")) == "11" for text in texts))
    assert leaks[0] > 0 and leaks[1] == 0
    assert source().fingerprint != found.fingerprint
    (valid,) = found.valid_batches(length=found.data.seq_len, batch=3)
    assert found.tokenizer.decode(valid.tokens[0][valid.context_mask[0]]) == TESTED.prompt
    assert not valid.loss_mask[1:].any() and not valid.segment_ids[1:].any()


def test_each_validation_example_occurs_once():
    found = source(valid=10)
    batches = list(found.valid_batches(length=found.data.seq_len, batch=4))
    assert len(batches) == 3 and all(batch.tokens.shape == (4, found.data.seq_len) for batch in batches)
    assert sum(batch.loss_mask.any(axis=1).sum() for batch in batches) == 10
