"""From logits to a token: temperature, top-k, top-p, min-p, suppression."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import RowSampling, SamplingParams, with_sampling

LOGITS = jnp.asarray(np.random.default_rng(0).normal(scale=2.0, size=(5, 40)), jnp.float32)


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def test_temperature_0_takes_the_likeliest():
    tokens, confidence = SamplingParams(temperature=0.0)(keys(5), LOGITS)
    assert (tokens == LOGITS.argmax(axis=-1)).all() and tokens.dtype == jnp.int32
    np.testing.assert_allclose(confidence, jax.nn.softmax(LOGITS).max(axis=-1), rtol=1e-5)
    law = jax.nn.softmax(SamplingParams(temperature=0.0).sharpened(LOGITS))
    assert (law.argmax(axis=-1) == tokens).all() and (law.max(axis=-1) == 1).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_logits(temperature):
    rows = 20_000
    logits = jnp.broadcast_to(LOGITS[:1, :12], (rows, 12))
    tokens, confidence = jax.jit(SamplingParams(temperature=temperature))(keys(rows), logits)
    law = np.asarray(jax.nn.softmax(LOGITS[0, :12] / temperature), np.float64)
    counts = np.bincount(tokens, minlength=12)
    kept = law * rows > 5
    seen = np.append(counts[kept], counts[~kept].sum())
    wanted = np.append(law[kept], law[~kept].sum() + 1e-9)
    assert stats.chisquare(seen, wanted / wanted.sum() * rows).pvalue > 1e-3
    # confidence is the model's own, whatever the temperature
    np.testing.assert_allclose(confidence, np.asarray(jax.nn.softmax(LOGITS[0, :12]))[tokens], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.99])
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p, temperature):
    kept = np.isfinite(SamplingParams(top_p=top_p, temperature=temperature).sharpened(LOGITS))
    law = np.asarray(jax.nn.softmax(LOGITS / temperature), np.float64)
    for keep, p in zip(kept, law, strict=True):
        assert p[keep].min() > p[~keep].max(initial=0)  # the likeliest ones
        assert p[keep].sum() >= top_p - 1e-6  # that hold top_p
        assert p[keep].sum() - p[keep].min() < top_p + 1e-6  # and none too many


@pytest.mark.parametrize("top_k", [1, 3, 40, 99])
def test_top_k_keeps_so_many(top_k):
    kept = np.isfinite(SamplingParams(top_k=top_k).sharpened(LOGITS))
    assert (kept.sum(axis=-1) == min(top_k, 40)).all()
    for keep, logits in zip(kept, np.asarray(LOGITS), strict=True):
        assert logits[keep].min() >= logits[~keep].max(initial=-np.inf)


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_is_a_share_of_the_likeliest(min_p):
    kept = np.isfinite(SamplingParams(min_p=min_p, temperature=0.7).sharpened(LOGITS))
    law = np.asarray(jax.nn.softmax(LOGITS / 0.7), np.float64)
    assert (kept == (law >= min_p * law.max(axis=-1, keepdims=True) * (1 - 1e-6))).all()


def test_top_p_keeps_the_logits_of_what_it_keeps():
    draw = SamplingParams(top_p=0.8).sharpened(LOGITS)
    kept = np.isfinite(draw)
    assert (np.asarray(draw)[kept] == np.asarray(LOGITS)[kept]).all()


def test_suppressed_tokens_are_never_sampled_nor_counted():
    logits = jnp.zeros((2_000, 6)).at[:, 3].set(50.0)
    for draw in (
        SamplingParams(suppressed=(3, 0)),
        SamplingParams(suppressed=(3, 0), top_p=0.9),
        SamplingParams(suppressed=(3, 0), temperature=0),
    ):
        tokens, confidence = draw(keys(2_000), logits)
        assert not np.isin(tokens, (3, 0)).any()
        np.testing.assert_allclose(confidence, 0.25, rtol=1e-5)


def test_a_row_draws_the_same_alone():
    draw = SamplingParams(temperature=1.3, top_p=0.9)
    tokens, _ = draw(keys(5), LOGITS)
    for i in range(5):
        alone, _ = draw(keys(5)[i : i + 1], LOGITS[i : i + 1])
        assert alone[0] == tokens[i]


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf"), 101.0, 1e-9])
def test_absurd_temperatures(temperature):
    with pytest.raises(ValueError, match=r"^temperature must be [^\n]*$"):
        SamplingParams(temperature=temperature)


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.01, float("nan")])
def test_absurd_top_p(top_p):
    with pytest.raises(ValueError, match=r"^top_p must be [^\n]*$"):
        SamplingParams(top_p=top_p)


def test_rows_with_values_of_their_own_are_as_with_one_for_all():
    each = [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.6}, {"min_p": 0.2}, {"temperature": 2.0}]
    values = {
        name: jnp.array([row.get(name, default) for row in each])
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0))
    }
    logits = jnp.stack([LOGITS, LOGITS[::-1], 2 * LOGITS], axis=1)  # [5, 3, 40]
    rule = RowSampling(**values, rest=SamplingParams(top_k=30, suppressed=(3, 5)))
    tokens, confidence = jax.jit(lambda rule, keys, logits: rule(keys, logits))(rule, keys(5), logits)
    flat = jax.nn.softmax(rule.sharpened(logits.reshape(15, 40))).reshape(5, 3, 40)
    for row, options in enumerate(each):
        own = SamplingParams(top_k=30, suppressed=(3, 5), **options)
        alone = own(keys(5), logits)
        assert (tokens[row] == alone[0][row]).all()
        np.testing.assert_allclose(confidence[row], alone[1][row], rtol=1e-5)
        np.testing.assert_allclose(flat[row], jax.nn.softmax(own.sharpened(logits[row])), rtol=1e-5)


def test_a_rule_is_replaced_wherever_it_is():
    inside = Confidence(denoising_steps=2, eos=0, sampling=SamplingParams(temperature=0.0))
    blocks = BlockDiffusion(sampler=inside, canvas_length=4, mask=9, eos=0)
    rule = RowSampling(temperature=jnp.ones(2), top_p=jnp.ones(2), min_p=jnp.zeros(2), rest=SamplingParams())
    assert with_sampling(blocks, rule).sampler.sampling is rule and with_sampling(blocks, None) is blocks
    assert dataclasses.replace(with_sampling(blocks, rule), sampler=inside) == blocks
