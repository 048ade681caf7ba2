"""The engine without HTTP: which sampler, a converted model's published one, rows that end at a stop string."""

import json
import threading

import pytest
from support import parity
from support.loaded import loaded
from support.sources import write_source

import diffusion_lm as dlm
from diffusion_lm.convert.loading import load_source
from diffusion_lm.inference import by_name
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.embedding_flow import EmbeddingFlowLoss
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.serving import ask
from diffusion_lm.serving.engine import Engine
from launch import sampler_flags


def answered(engine, *requests):
    """The tickets of requests that are asked together, once all are answered."""
    done, tickets = [threading.Event() for _ in requests], []
    for fields, event in zip(requests, done, strict=True):
        asked = ask.read(json.dumps(fields).encode(), chat=False, name="tiny", model=engine.model)
        tell = lambda sent, event=event: event.set() if sent is None or isinstance(sent, Exception) else None  # noqa: E731
        tickets.append(engine.submit(asked, tell))
    for event in done:
        assert event.wait(60)
    return tickets


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("llada")
    settings = {"steps": 8, "block_length": 4, "cfg_scale": 0.5}
    write_source(folder, "llada", {"eos_token_id": parity.config("llada").get("eos_token_id", 0)}, settings)
    return load_source(folder, dtype="float32")


def test_a_published_sampler_is_named_and_has_its_own_settings_until_others_are_given(llada):
    engine = Engine(llada, max_rows=4, max_waiting=4)
    try:
        assert engine.samplers[:2] == ["confidence", "published"]
        fields = {"prompt": "w5 w6", "max_tokens": 16, "sampler": "published", "seed": 3}
        requests = [fields, fields | {"prompt": "w7 w8 w2 w5"}, fields | {"temperature": 0.7, "cfg_scale": 0}]
        greedy, other, sampled = answered(engine, *requests)
        for ticket, prompt, given in (
            (greedy, "w5 w6", {}),
            (other, "w7 w8 w2 w5", {}),
            (sampled, "w5 w6", {"temperature": 0.7, "cfg_scale": 0.0}),
        ):
            want = dlm.generate(llada, prompt, sampler="published", max_new_tokens=16, seed=3, **given)
            ids = want.output.generation.tokens[0, : want.num_tokens[0]]
            assert ticket.answers[0].ids.tolist() == ids.tolist()
        assert sampled.answers[0].ids.tolist() != greedy.answers[0].ids.tolist()
        with pytest.raises(ask.RequestError, match=r"cfg_scale=0\.5: set it to 0"):
            answered(engine, fields | {"suffix": " w5 w6"})
        (filled,) = answered(engine, fields | {"suffix": " w5 w6", "max_tokens": 3, "cfg_scale": 0})
        whole = dlm.infill(llada, ["w5 w6", 3, " w5 w6"], sampler="published", seed=3, cfg_scale=0.0).output.generation
        assert filled.answers[0].ids.tolist() == whole.tokens[0, : len(filled.answers[0].ids)].tolist()
        assert greedy.ask.draw["temperature"] == 0.0 and greedy.ask.cfg_scale == 0.5 and greedy.written[0].nfe == 8
    finally:
        engine.close()


def test_a_stop_string_ends_its_row(served):
    whole = dlm.generate(served.model, "Line 1", sampler="autoregressive", max_new_tokens=40, seed=1)
    stop = whole.text[3:5]
    fields = {"prompt": "Line 1", "max_tokens": 40, "sampler": "autoregressive", "seed": 1}
    (ticket,) = answered(served.engine, fields | {"stop": stop})
    assert ticket.answers[0].text == whole.text[: whole.text.index(stop)]
    assert ticket.written[0].nfe <= len(ticket.answers[0].ids) + 2 < whole.nfe


@pytest.mark.parametrize(
    ("objective", "process", "names"),
    [
        (AutoregressiveLoss(), None, ("autoregressive",) * 2),
        (ELBO(), None, ("confidence",) * 2),
        (ELBO(), Uniform(), ("reverse_process", "ancestral")),
        (EmbeddingFlowLoss(), Gaussian(), ("reverse_process", "embedding_flow")),
    ],
    ids=["ar", "masks", "tokens", "embeddings"],
)
def test_there_is_one_default(objective, process, names):
    """In Python, the server and launch.sample, which calls the reverse process by what it is."""
    model = loaded(objective, process)
    sampler_flags.FLAGS.parse([])
    assert (by_name.default_name(model), sampler_flags.name(model)) == names
    assert ask.known_samplers(model)[0] == names[0]
    assert by_name.make_sampler(model) == by_name.make_sampler(model, names[0])
