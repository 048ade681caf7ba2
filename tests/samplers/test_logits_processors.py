"""Every sampler applies a logits processor, which sees the text so far and no more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support import tiny
from support.logits_processors import Alternating, Tattling
from support.oracle import LENGTH, OracleModel, Read, truth
from support.oracle import MASK as WORLD_MASK
from support.text_samplers import TEXT_SAMPLERS, prompts
from support.tiny import MASK, model

from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.logits_processors import (
    Chain,
    FrequencyPenalty,
    NoRepeatNGram,
    RepetitionPenalty,
    SuppressTokens,
)
from diffusion_lm.samplers.processed_denoiser import ProcessedDenoiser

NEVER = 99


def generated(text_sampler, processor, prompt, length):
    return tiny.generated(
        ProcessedDenoiser(network=model(), mask=MASK, processor=processor), text_sampler, prompt, length
    )


@dataclasses.dataclass(frozen=True)
class Stairs:
    """Each token is within two of the token before it, where that is known."""

    def __call__(self, logits, text, at):
        before = text[jnp.maximum(at - 1, 0)]
        fits = jnp.abs(jnp.arange(logits.shape[0], dtype=jnp.int32) - before) <= 2
        return jnp.where((before == logits.shape[0]) | fits, logits, -jnp.inf)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", TEXT_SAMPLERS)
def test_every_sampler_applies_a_processor_that_depends_on_the_column(name):
    prompt = prompts([6, 1, 3])
    generation = generated(TEXT_SAMPLERS[name](eos=NEVER), Alternating(), prompt, 10)
    columns = np.asarray(prompt.length)[:, None] + np.arange(10)
    assert ((np.asarray(generation.tokens) - columns) % 2 == 0).all()


@pytest.mark.parametrize("name", ["autoregressive", "auto"])
def test_autoregressive_samplers_apply_a_processor_of_the_previous_token(name):
    prompt = prompts([6, 1, 3])
    options = {"step_s": 1e-3} if name == "auto" else {}
    generation = generated(TEXT_SAMPLERS[name](eos=NEVER, temperature=3.0, **options), Stairs(), prompt, 10)
    for row, length, tokens in zip(generation.tokens, prompt.length, prompt.tokens, strict=True):
        text = np.concatenate([tokens[length - 1 : length], row])
        assert (np.abs(np.diff(text)) <= 2).all()


def test_a_processor_sees_the_prefix_or_what_the_canvas_has_committed():
    prompt = Prompt(tokens=jnp.full((1, 2), 5), length=jnp.full(1, 2))
    causal = generated(TEXT_SAMPLERS["autoregressive"](eos=NEVER), Tattling(), prompt, 8)
    assert causal.tokens[0].tolist() == list(range(2, 10))
    canvas = generated(
        TEXT_SAMPLERS["confidence"](eos=NEVER, denoising_steps=4), Tattling(), prompt, 8
    )  # one position a pass
    assert sorted(canvas.tokens[0, :4].tolist()) == [2, 3, 4, 5] and sorted(canvas.tokens[0, 4:].tolist()) == [
        6,
        7,
        8,
        9,
    ]


def test_tokens_are_sampled_from_the_processed_logits():
    """With token 0 suppressed, texts have the distribution of the others, renormalised at each token."""
    world, rows = OracleModel(1 + LENGTH), 4_096
    world = _WithCache(world)
    prompt = Prompt(tokens=jnp.zeros((rows, 1), jnp.int32), length=jnp.ones(rows, jnp.int32))
    network = ProcessedDenoiser(network=world, mask=WORLD_MASK, processor=SuppressTokens(tokens=(0,)))
    text_sampler = AutoregressiveSampler(mask=WORLD_MASK, eos=NEVER)
    generate = jax.jit(
        lambda keys: text_sampler.generate(
            network, network.empty_cache(rows, 1 + LENGTH), prompt, keys, max_new_tokens=LENGTH
        )
    )
    tokens = np.asarray(generate(jax.random.split(jax.random.key(3), rows)).tokens)
    assert (tokens != 0).all()
    p = truth().reshape((3,) * LENGTH)
    law = np.ones((2,) * LENGTH)
    for i in range(LENGTH):  # p(x_i | before) without token 0
        marginal = p.sum(axis=tuple(range(i + 1, LENGTH)))[(slice(1, None),) * (i + 1)]
        conditional = marginal / marginal.sum(axis=-1, keepdims=True)
        law = law * conditional.reshape(conditional.shape + (1,) * (LENGTH - i - 1))
    counts = np.bincount((tokens - 1) @ np.array([8, 4, 2, 1]), minlength=16)
    assert stats.chisquare(counts, law.reshape(-1) / law.sum() * rows).pvalue > 1e-3


@dataclasses.dataclass(frozen=True)
class _WithCache:
    """The world with `empty_cache`."""

    world: OracleModel

    def empty_cache(self, rows, slots) -> Read:
        return self.world.empty(rows)

    def __getattr__(self, name):
        return getattr(self.world, name)


def test_repetition_penalty_divides_or_multiplies_the_logits_of_what_occurs():
    logits, text = jnp.array([2.0, 2.0, -2.0, -2.0, 0.0]), jnp.array([1, 3, 4, 1, 5, 5])  # 5 is unknown
    found = RepetitionPenalty(penalty=1.25)(logits, text, jnp.asarray(4))
    np.testing.assert_allclose(found, [2.0, 1.6, -2.0, -2.5, 0.0])


def test_frequency_penalty_subtracts_nats_for_each_occurrence():
    logits, text = jnp.zeros(5), jnp.array([1, 2, 1, 5, 3, 1])
    everywhere = FrequencyPenalty(nats=0.5)(logits, text, jnp.asarray(3))
    assert everywhere.tolist() == [0, -1.5, -0.5, -0.5, 0]
    near = FrequencyPenalty(nats=0.5, window=1)(logits, text, jnp.asarray(3))
    assert near.tolist() == [0, -0.5, 0, -0.5, 0]


def test_frequency_penalty_ignores_a_common_offset():
    text = jnp.array([1, 2, 1, 5, 3, 1])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=5), jnp.float32)
    one, other = (jax.nn.softmax(FrequencyPenalty(nats=0.7)(logits + c, text, jnp.asarray(3))) for c in (0.0, 5.0))
    assert np.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_occurs_twice(size):
    prompt = prompts([4, 1, 3])
    generation = generated(
        TEXT_SAMPLERS["autoregressive"](eos=NEVER, temperature=0.0),
        NoRepeatNGram(size=size),
        prompt,
        20 if size > 1 else 6,
    )
    for row, length, tokens in zip(np.asarray(generation.tokens), prompt.length, prompt.tokens, strict=True):
        text = np.concatenate([tokens[:length], row]).tolist()
        runs = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        new = runs[max(int(length) - size + 1, 0) :]
        assert len(set(new)) == len(new) and not set(new) & set(runs[: len(runs) - len(new)])


def test_an_ngram_is_seen_on_both_sides_of_a_mask():
    text = jnp.array([1, 2, 3, 12, 1, 12, 3])  # 1 2 3 stands: between 1 and 3 no 2
    said = NoRepeatNGram(size=3)(jnp.zeros(12), text, jnp.asarray(5))
    assert said[2] < -1e3 and (jnp.delete(said, 2) == 0).all()


def test_where_all_is_penalised_a_token_is_sampled():
    text = jnp.array([0, 1, 2, 3])
    said = NoRepeatNGram(size=1)(jnp.array([0.0, 1.0, 2.0]), text[:3], jnp.asarray(3))
    assert jnp.argmax(said) == 2 and jnp.isfinite(said).all()


def test_a_chain_applies_all_processors():
    rule = Chain((SuppressTokens(tokens=(2, 4)), Alternating()))
    generation = generated(TEXT_SAMPLERS["confidence"](eos=NEVER), rule, prompts([6, 1, 3]), 10)
    assert not np.isin(generation.tokens, (2, 4)).any()


def test_a_processor_without_effect_changes_nothing():
    prompt = prompts([6, 1, 3])
    for name in ("auto", "both ways"):
        text_sampler = TEXT_SAMPLERS[name]()
        free = generated(text_sampler, SuppressTokens(tokens=()), prompt, 10)
        keys = jax.random.split(jax.random.key(0), 3)
        cache = model().empty_cache(3, text_sampler.slots(6, 10))
        plain = jax.jit(lambda keys, w=text_sampler, c=cache: w.generate(model(), c, prompt, keys, max_new_tokens=10))(
            keys
        )
        assert (free.tokens == plain.tokens).all()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: FrequencyPenalty(nats=0.0),
        lambda: FrequencyPenalty(nats=float("nan")),
        lambda: FrequencyPenalty(nats=1.0, window=-1),
        lambda: NoRepeatNGram(size=0),
        lambda: RepetitionPenalty(penalty=0.0),
    ],
)
def test_impossible_values_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        bad()
    assert "\n" not in str(error.value)
