"""OpenAI's own client against the server: texts, streams, batches, what is refused, clients that leave."""

import concurrent.futures
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.commands import ROOT, environment

import diffusion_lm as dlm
from diffusion_lm.data.tokenizer import SentencePiece
from diffusion_lm.samplers.base import DIFFUSION
from diffusion_lm.serving import ask
from diffusion_lm.serving.app import make_app
from launch.benchmarks import serving

CANVAS = {"sampler": "confidence", "denoising_steps": 3, "canvas_length": 8}
AR = {"sampler": "autoregressive"}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def complete(client, prompt="Line 1", how=AR, **options):
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=20, extra_body=how, **options)


def alone(served, prompt="Line 1", how=AR, **options):
    return dlm.generate(served.model, prompt, max_new_tokens=20, **how, **options)


@pytest.mark.cases(1)
@pytest.mark.parametrize("how", [CANVAS, AR], ids=lambda how: how["sampler"])
def test_texts_are_those_of_the_library(served, client, how):
    assert [model.id for model in client.models.list()] == ["tiny"]
    seeded = [{"temperature": 0.9, "seed": 3_000_000_000}] if how is AR else []
    for options in ({"temperature": 0.0}, *seeded):
        answer, whole = complete(client, how=how, **options), alone(served, how=how, **options)
        assert answer.choices[0].text == whole.text and answer.usage.nfe == whole.nfe
        assert answer.usage.completion_tokens == whole.num_tokens[0]
        ended = whole.num_tokens[0] < 20
        assert answer.choices[0].finish_reason == ("stop" if ended else "length")
        chunks = list(complete(client, how=how, stream=True, stream_options={"include_usage": True}, **options))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.text
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens and len(chunks) > 1


def test_n_texts_and_several_prompts_and_ids(served, client):
    texts = [choice.text for choice in complete(client, n=3, seed=5).choices]
    assert texts == list(alone(served, ["Line 1"] * 3, seed=5).texts)
    ids = served.model.tokenizer.encode("Line 1").tolist()
    two = complete(client, prompt=["Line 2", "Line 1"], n=2, seed=5)
    assert [c.index for c in two.choices] == [0, 1, 2, 3] and [c.text for c in two.choices[2:]] == texts[:2]
    with_ids = complete(client, prompt=[served.model.tokenizer.bos, *ids], seed=5)
    assert with_ids.choices[0].text == texts[0]


def test_requests_that_come_together_are_a_batch_and_answers_are_those_of_one_alone(served, client, monkeypatch):
    sizes, rows = [], type(served.engine)._start

    def noted(self, tickets):
        sizes.append(len(tickets))
        return rows(self, tickets)

    monkeypatch.setattr(type(served.engine), "_start", noted)
    prompts = ["Line 1", "Line 22: the", "a", "Line 3: hen"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, client, prompt, seed=i) for i, prompt in enumerate(prompts)]
        texts = [future.result().choices[0].text for future in asked]
    assert texts == [alone(served, prompt, seed=i).text for i, prompt in enumerate(prompts)]
    assert 1 <= sum(size > 0 for size in sizes) <= 4 and sum(sizes) == 4


def test_stop_strings_log_probabilities_and_chats(served, client):
    whole = alone(served, seed=1).text
    answer = complete(client, seed=1, stop=[whole[5:7]], logprobs=0).choices[0]
    assert answer.text == whole[: whole.index(whole[5:7])] and answer.finish_reason == "stop"
    assert all(p <= 0 for p in answer.logprobs.token_logprobs) and len(answer.logprobs.tokens) >= len(answer.text)
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": [{"type": "text", "text": "Line 1"}]}]
    chat = functools.partial(client.chat.completions.create, model="tiny", messages=messages, seed=2, extra_body=AR)
    said = chat(max_completion_tokens=9, logprobs=True).choices[0]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(max_tokens=9, stream=True)]
    assert "".join(pieces) == said.message.content and said.message.role == "assistant"
    assert 0 < len(said.logprobs.content) <= 9 and all(token.logprob <= 0 for token in said.logprobs.content)


def test_a_hole_is_filled_and_passes_lead_to_the_text(served, client):
    more = {"seed": 4, "passes": True, "stream": True, **CANVAS}
    body = {"prompt": "Line ", "suffix": ": the cat", "max_tokens": 3, **more}
    passes, text = passes_of(served, body)
    whole = dlm.infill(served.model, ["Line ", 3, ": the cat"], seed=4, **CANVAS).text
    assert "Line " + text + ": the cat" == whole and len(passes) == 5
    assert [sum(token is None for token in tokens) for tokens in passes] == [3, 2, 1, 0, 0]
    passes, text = passes_of(served, {"prompt": "Line ", "max_tokens": 20, **more})
    assert served.model.tokenizer.decode([token for *_, token in passes[-1]]) == text
    assert all(0 < p <= 1 and writer == DIFFUSION for _, p, writer, _ in passes[-1])


def test_a_text_is_tokenized_as_a_prompt_or_as_what_follows(served):
    tokenizer = served.model.tokenizer
    ask = lambda **fields: httpx.post(f"{served.url}/tokenize", content=json.dumps(fields)).json()  # noqa: E731
    ids = tokenizer.encode("Line 1").tolist()
    whole = ask(prompt="Line 1", model="tiny")
    assert whole["tokens"] == [tokenizer.bos, *ids] and whole["count"] == len(ids) + 1 and whole["max_model_len"] == 64
    follows = ask(prompt="Line 1", add_special_tokens=False)
    assert follows["tokens"] == ids and "".join(follows["token_strs"]) == "Line 1"
    assert ask(prompt="", add_special_tokens=False)["tokens"] == []
    for fields, said in (
        ({"prompt": 5}, "must be a string"),
        ({"text": "a"}, "no field"),
        ({"prompt": "\ud800"}, "valid"),
    ):
        for begins in (True, False):
            assert said in ask(**fields, add_special_tokens=begins)["error"]["message"]


def test_a_suffix_follows_the_hole(served):
    """SentencePiece's defaults put a space before a text that is encoded alone."""
    model, text = io.BytesIO(), ["Return the list of the values.", "the value of a list"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=45, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = SentencePiece(proto=model.getvalue())
    body = json.dumps({"prompt": "Re", "suffix": "turn the list", "max_tokens": 3}).encode()
    before, _, after = ask.read(body, chat=False, name="", model=served.model._replace(tokenizer=tokenizer)).infill
    assert tokenizer.decode([*before, *after]) == "Return the list"


def passes_of(served, body):
    """The tokens after each pass, and the text."""
    passes, tokens, text = [], [], ""
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                tokens = tokens[: choice["pass"]["at"]] + choice["pass"]["tokens"]
                passes.append(tokens)
                text += choice["text"]
    return passes, text


# ---- what is refused ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=5,
)
NAMES = "model prompt messages max_tokens n seed stop stream temperature top_p top_k logprobs sampler suffix"
BROKEN = st.one_of(
    st.binary(max_size=40).filter(lambda body: not body.lstrip().startswith(b"{")),
    JSON.filter(lambda value: not isinstance(value, dict)).map(lambda value: json.dumps(value).encode()),
    st.tuples(
        st.sampled_from(NAMES.split()),
        st.sampled_from(
            [-1, 2**40, 1e400, float("nan"), {"a": 1}, [[]], [None], [-1], [10**9], ["\ud800"], "\ud800", ["x"] * 99]
        ),
    ).map(lambda pair: json.dumps({"max_tokens": 9, "prompt": "a", pair[0]: pair[1]}).encode()),
    st.dictionaries(st.text(min_size=1, max_size=5), JSON, min_size=1, max_size=3).map(
        lambda fields: json.dumps({"prompt": "a", **fields, "\u00e9": 1}).encode()
    ),
)  # fmt: skip


@given(BROKEN, st.sampled_from(["completions", "chat/completions"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_malformed_requests_are_4xx_in_one_line(served, caplog, body, path):
    reply = httpx.post(f"{served.url}/v1/{path}", content=body)
    assert 400 <= reply.status_code < 500, (body, reply.text)
    error = reply.json()["error"]
    assert error["message"] and "\n" not in error["message"] and error["type"] == "invalid_request_error"
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"prompt": "a" * 80}, 400, "context 64"),
        ({"prompt": "a" * 40, "max_tokens": 30}, 400, "at most 23 are left"),
        ({"model": "gpt-4"}, 404, "but 'tiny'"),
        ({"sampler": "renoise"}, 400, "is none of"),
        ({"logprobs": 5}, 400, "logprobs is not supported"),
        ({"echo": True}, 400, "echo is not supported"),
        ({"temperature": 1e-9}, 400, "temperature must be 0"),
        ({"n": 65}, 400, "n must be an integer from 1 to 64"),
        ({"suffix": "x", "n": 2}, 400, "suffix goes with one prompt"),
        ({"suffix": "x", "sampler": "autoregressive"}, 400, "can't infill"),
        ({"canvas_length": 9, "sampler": "autoregressive"}, 400, "has no canvas"),
        ({"prompt": "x" * 5_000_000}, 413, "at most 4000000 bytes"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_named(served, fields, status, said):
    reply = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", **fields})
    assert reply.status_code == status and said in reply.json()["error"]["message"]


def test_a_full_queue_is_429(served, client, monkeypatch):
    monkeypatch.setattr(served.engine, "_next", lambda: [])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(complete, client, seed=1) for _ in range(4)]
        while served.engine.load()["waiting"] < 4:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="4 requests are waiting"):
            complete(client)
        monkeypatch.undo()
        with served.engine._changed:
            served.engine._changed.notify()
        assert len({future.result().choices[0].text for future in waiting}) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(served, client, monkeypatch, stream):
    passes, advance = [], type(served.engine)._advance

    def slow(self, batch):
        passes.append(1)
        time.sleep(0.1)
        return advance(self, batch)

    monkeypatch.setattr(type(served.engine), "_advance", slow)
    body = {"prompt": "Line", "max_tokens": 50, "stream": stream, "seed": 1, **AR}
    with httpx.Client() as short:
        if stream:
            with short.stream("POST", f"{served.url}/v1/completions", json=body) as reply:
                next(reply.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                short.post(f"{served.url}/v1/completions", json=body, timeout=0.5)
    assert served.idle() and len(passes) < 20


def test_a_batch_that_fails_is_told_to_its_clients_and_the_next_runs(served, client, monkeypatch):
    def broken(self, batch):
        raise ValueError("the network's logits were not finite")

    monkeypatch.setattr(type(served.engine), "_advance", broken)
    with pytest.raises(openai.InternalServerError, match="not finite"):
        complete(client)
    with pytest.raises(openai.APIError, match="not finite"):
        list(complete(client, stream=True))
    monkeypatch.undo()
    monkeypatch.setattr(type(served.engine), "_start", broken)  # what a request can't have is its fault
    with pytest.raises(openai.BadRequestError, match="not finite"):
        complete(client)
    monkeypatch.undo()
    assert complete(client, seed=1).choices[0].text == alone(served, seed=1).text


def test_a_key_and_only_pages_of_its_own(served):
    closed = TestClient(
        make_app(served.engine, "tiny", api_key="secret", hosts=("127.0.0.1",)), "http://127.0.0.1:8000"
    )
    key = {"Authorization": "Bearer secret"}
    assert closed.get("/v1/models").status_code == 401 and closed.get("/v1/models", headers=key).status_code == 200
    assert closed.post("/v1/completions", json={}).json()["error"]["code"] == "invalid_api_key"
    assert closed.get("/").status_code == closed.get("/health").status_code == 200
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert closed.get("/v1/models", headers=key | headers).status_code == 403
    assert closed.get("/nowhere").json()["error"]["message"] and closed.get("/v1/completions").status_code == 405


def test_the_launcher_serves_and_drains(trained):
    """SIGTERM in mid-stream: the stream goes on to its end, then the launcher ends with its one line."""
    command = [sys.executable, "-m", "launch.serve", f"--workdir={trained[0]}/work", "--port=0", "--name=tiny"]
    server = subprocess.Popen(
        [*command, f"--compile_cache={trained[0]}/programs"], cwd=ROOT, env=environment(trained[0]), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    url = next(line for line in server.stderr if "is served at" in line).split()[-1]
    body = {"prompt": "Line", "max_tokens": 40, "stream": True, "seed": 1}
    with httpx.stream("POST", f"{url}v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    out, _ = server.communicate(timeout=30)
    assert server.returncode == 0 and json.loads(out) == {"served": 1}


def test_the_launcher_refuses_a_public_address_without_a_key(capsys):
    from support.commands import call

    from launch import serve

    status, _, err = call(capsys, serve, "--workdir=nowhere", "--host=0.0.0.0")
    assert status == 2 and "--api_key_file" in err and np.size(err.splitlines()) == 1


def test_answers_under_load_are_those_of_one_alone(served):
    asked = serving.requests(6, "autoregressive", 20, seed=0)
    found = serving.measure(served.url, os.getpid(), asked, clients=4, seconds=1)
    assert found["answers"] >= 4 and found["failed"] == found["other_than_alone"] == 0
