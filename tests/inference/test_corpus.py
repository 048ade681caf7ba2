"""A model's own texts as a file of records: in order, none lost or twice after a kill, and good to train on."""

import json

import pytest

import diffusion_lm as dlm
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.inference.corpus import Asked, Shard, encode, read_prompts, write_corpus
from diffusion_lm.objectives.block import BlockELBO

ASKED = [Asked(prompt=f"Line {i}: the") for i in range(7)] + [Asked()]
SETTINGS = {"temperature": 1.0}


class KilledError(Exception):
    """In place of kill -9."""


@pytest.fixture(scope="module")
def write(model):
    """(path, texts before a kill, rows a batch, settings) -> what write_corpus returns."""
    sampler = dlm.make_sampler(model, "autoregressive")

    def made(path, *, kill_after=None, batch_size=4, settings=SETTINGS, asked=ASKED, **shard):
        texts = iter(range(10**6 if kill_after is None else kill_after))

        def cut(text):
            if next(texts, None) is None:
                raise KilledError
            return text.partition(".")[0]

        options = {"max_new_tokens": 12, "seed": 3, "cut": cut, **shard}
        return write_corpus(model, sampler, asked, path, settings=settings, batch_size=batch_size, **options)

    return made


@pytest.fixture(scope="module")
def whole(write, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "corpus.jsonl"
    return write(path), path


def test_one_record_a_prompt_in_order(whole):
    written, path = whole
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [one.prompt for one in ASKED]
    assert (written.rows, written.new, written.nfe > 0) == (8, 8, True)
    assert written.unfinished == sum(not row["finished"] for row in rows)
    assert all("." not in row["completion"] for row in rows)


def test_goes_on_after_a_kill_as_if_nothing_had_been(whole, write, tmp_path):
    """Killed in its second batch, with half a line in the file, and continued in batches of the same size."""
    path = tmp_path / "corpus.jsonl"
    with pytest.raises(KilledError):
        write(path, kill_after=5)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    path.write_bytes(b"".join(lines) + b'{"prompt": "Line 4: th')
    assert write(path).new == 4
    assert path.read_bytes() == whole[1].read_bytes()
    assert write(path).new == 0 and path.read_bytes() == whole[1].read_bytes()


@pytest.mark.parametrize("count", [2, 3])
def test_the_parts_of_several_processes_are_the_whole(count, whole, write, tmp_path):
    path = tmp_path / "corpus.jsonl"
    for index in reversed(range(count)):
        write(path, shard=Shard(index, count))
    parts = sorted(tmp_path.glob("*.jsonl"))
    assert [part.name for part in parts] == [f"corpus-0000{i}-of-0000{count}.jsonl" for i in range(count)]
    assert b"".join(part.read_bytes() for part in parts) == whole[1].read_bytes()
    parts[0].rename(tmp_path / "corpus-00001-of-00009.jsonl")
    settings = parts[0].with_suffix(".settings.json")
    settings.rename(tmp_path / "corpus-00001-of-00009.settings.json")
    with pytest.raises(ValueError, match="begun with another prompts, shard"):
        write(path, shard=Shard(1, 9))


def test_a_file_of_other_settings_is_not_continued(whole, write, tmp_path):
    _, path = whole
    with pytest.raises(ValueError, match="begun with another temperature: set them back"):
        write(path, settings={"temperature": 0.5})
    with pytest.raises(ValueError, match="begun with another prompts"):
        write(path, asked=ASKED[:3])
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    with pytest.raises(ValueError, match=r"no other\.settings\.json says what it was begun with"):
        write(other)
    assert other.read_text() == "{}\n"


def test_rows_are_records_to_train_on(whole, model):
    data = PromptResponse(path=str(whole[1]), seq_len=64, val_fraction=0.0, tokenizer=model.tokenizer)
    for layout in (dlm.AutoregressiveLoss().layout, BlockELBO(block_size=4).layout):
        assert next(data.open(layout).train_batches(length=64, batch=1, seed=0)).loss_mask.any()


def test_prompts_of_a_file(tmp_path, model):
    chat = [{"role": "user", "content": "Hi"}]
    records = [{"prompt": "a"}, {"messages": chat}, {"messages": [*chat, {"role": "assistant", "content": "b"}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_prompts(str(tmp_path / "p.jsonl")) == [Asked("a"), Asked(messages=chat), Asked(messages=chat)]
    assert read_prompts(str(tmp_path / "p.jsonl"))[2].record("c", True) == {
        "messages": [*chat, {"role": "assistant", "content": "c"}], "finished": True,
    }  # fmt: skip
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(str(tmp_path / "p.txt")) == [Asked("one"), Asked("two")]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}')
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: there is neither a prompt nor a list of messages"):
        read_prompts(str(tmp_path / "p.jsonl"))
    with pytest.raises(ValueError, match="this one was trained on plain text"):
        encode(model, [Asked(messages=chat)])
    with pytest.raises(ValueError, match="prompt 2: the prompt has"):
        encode(model, [Asked("a"), Asked("a" * 200)])
