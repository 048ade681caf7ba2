"""Speculative text is the autoregressive text, whatever the drafts; drafts only change how many passes it takes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracle import LENGTH, NEVER, OracleModel, p_value
from support.oracle import MASK as WORLD_MASK
from support.tiny import EOS, MASK, VOCAB, model

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.drafters import Drafter, MaskedDraft, PromptLookup, TiDARDraft, TrainedDraft
from diffusion_lm.samplers.logits_processors import NoRepeatNGram
from diffusion_lm.samplers.processed_denoiser import ProcessedDenoiser
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.speculative import Speculative

DRAFTERS = [
    PromptLookup(num_tokens=1),
    PromptLookup(num_tokens=4, max_ngram=2),
    MaskedDraft(mask=MASK, num_tokens=2),
    TiDARDraft(num_tokens=2),
    TrainedDraft(num_tokens=3),
    TiDARDraft(num_tokens=2, causal=True),
]


def generated(text_sampler, prompt, keys, length):
    return _generated(text_sampler, prompt, keys, length, model())


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generated(text_sampler, prompt, keys, length, bound):
    cache = bound.empty_cache(len(keys), text_sampler.slots(prompt.tokens.shape[1], length))
    return text_sampler.generate(bound, cache, prompt, keys, max_new_tokens=length)


def prompts(rows, width=6, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, size=rows)
    tokens = np.where(np.arange(width) < lengths[:, None], rng.integers(3, VOCAB, size=(rows, width)), 0)
    return Prompt(tokens=jnp.asarray(tokens, jnp.int32), length=jnp.asarray(lengths, jnp.int32))


def pair(drafter, temperature, eos=EOS, break_even=0.0):
    both = {"mask": MASK, "eos": eos, "sampling": SamplingParams(temperature=temperature)}
    return AutoregressiveSampler(**both), Speculative(drafter=drafter, break_even=break_even, **both)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("drafter", "temperature", "break_even"),
    [*((drafter, 1.0, 0.0) for drafter in DRAFTERS), (DRAFTERS[1], 0.0, 1.5), (DRAFTERS[2], 1.0, 1.5)],
    ids=str,
)
def test_the_text_is_the_autoregressive_one(drafter, temperature, break_even):
    """1,000 ragged prompts in one batch, token for token."""
    plain, speculative = pair(drafter, temperature, break_even=break_even)
    prompt, keys = prompts(1_000), jax.random.split(jax.random.key(1), 1_000)
    one, other = generated(plain, prompt, keys, 16), generated(speculative, prompt, keys, 16)
    assert (one.tokens == other.tokens).all() and (one.length == other.length).all()
    assert (np.asarray(one.length) < 16).any() and (np.asarray(one.length) == 16).any()  # ends were met, and not


@dataclasses.dataclass(frozen=True)
class Prophet(Drafter):
    """Drafts from a text known beforehand; with `wrong`, a token that is never accepted."""

    text: tuple[int, ...]
    num_tokens: int
    wrong: bool = False

    def __call__(self, model, cache, text, filled):
        known = jnp.pad(jnp.asarray(self.text, jnp.int32), (0, self.num_tokens))
        guess = known[filled[:, None] + jnp.arange(self.num_tokens, dtype=jnp.int32)[None]]
        return jnp.full_like(guess, MASK) if self.wrong else guess


def test_right_drafts_save_passes_and_wrong_ones_cost_none():
    plain, _ = pair(DRAFTERS[0], 1.0, eos=NEVER)
    prompt = Prompt(tokens=jnp.array([[1, 5, 3]], jnp.int32), length=jnp.array([3]))
    keys = jax.random.split(jax.random.key(4), 1)
    text = generated(plain, prompt, keys, 21).tokens
    known = (1, 5, 3, *np.asarray(text[0]).tolist())
    for wrong, passes in ((False, 1 + 5), (True, 1 + 20)):  # the prompt's gives the first of 21; 20 = 5 x 4, or 20 x 1
        speculative = dataclasses.replace(pair(Prophet(known, 3, wrong), 1.0, eos=NEVER)[1])
        generation = generated(speculative, prompt, keys, 21)
        assert (generation.tokens == text).all() and generation.nfe == passes


class Dear(Prophet):
    num_passes = 1


@pytest.mark.parametrize("width", [2, 5])
def test_a_text_that_repeats_itself_takes_no_pass_to_draft(width):
    """As many passes as what followed the last time allows where the last three tokens were there before; elsewhere a
    draft takes one, and all are wrong."""
    length, prompt = 60, Prompt(tokens=jnp.array([[1, 5, 3]], jnp.int32), length=jnp.array([3]))
    both, keys = {"mask": MASK, "eos": NEVER}, jax.random.split(jax.random.key(4), 1)
    both["sampling"] = SamplingParams(temperature=0.2)
    plain = generated(AutoregressiveSampler(**both), prompt, keys, length)
    sampler = Speculative(drafter=Dear((0,), width, wrong=True), repeats=True, **both)
    found, row = generated(sampler, prompt, keys, length), [1, 5, 3, *np.asarray(plain.tokens[0]).tolist()]
    assert found.tokens[0].tolist() == row[3:]
    at, passes, repeated = 4, 1, 0  # the prompt's pass says a token
    while at < len(row):
        if at + width > len(row):  # no verification fits
            at, passes = at + 1, passes + 1
            continue
        text = jnp.asarray([row[:at] + [MASK] * (len(row) - at)], jnp.int32)
        (draft,), (match,) = PromptLookup(num_tokens=width).find(text, jnp.array([at]))
        known, right = bool(match >= 3), int(np.cumprod(np.asarray(draft) == row[at : at + width]).sum())
        at, passes, repeated = at + 1 + known * right, passes + 2 - known, repeated + known
    assert found.nfe == passes and repeated > 3


@pytest.mark.cases(2)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", [DRAFTERS[2], DRAFTERS[4], DRAFTERS[5]], ids=str)
def test_repeats_change_no_text(drafter, temperature):
    """Rows whose text repeats itself beside others, which end at different times."""
    plain, speculative = pair(drafter, temperature)
    prompt, keys = prompts(64, width=8), jax.random.split(jax.random.key(2), 64)
    prompt = prompt.replace(tokens=jnp.tile(prompt.tokens[:, :4], (1, 2)))
    one = generated(plain, prompt, keys, 24)
    other = generated(dataclasses.replace(speculative, repeats=True), prompt, keys, 24)
    assert (one.tokens == other.tokens).all() and (one.length == other.length).all()


@pytest.mark.parametrize("break_even", [0.0, 1.05])
def test_a_verifying_pass_makes_the_next_draft(break_even):
    """As many passes as the drafts of a canvas after each token, predicted separately, allow; a few more with plain
    steps at the start."""
    length, width, saved = 48, 2, 0
    plain, speculative = pair(TiDARDraft(num_tokens=width), 0.3, NEVER, break_even)
    prompt = Prompt(tokens=jnp.array([[1, 5, 3]], jnp.int32), length=jnp.array([3]))
    for seed in range(8):
        key = jax.random.split(jax.random.key(seed), 1)
        text = generated(plain, prompt, key, length).tokens
        generation = generated(speculative, prompt, key, length)
        assert (generation.tokens == text).all()
        least = _least(np.concatenate([prompt.tokens, text], axis=1), 4, width)  # the prompt's pass says a token
        assert generation.nfe == least if not break_even else least <= generation.nfe <= length
        saved += length - int(generation.nfe)
    assert saved > 8


def _least(row, at, width):
    """Passes that generate row[:, at:], the prompt's among them, if each drafts for the next."""
    guesses = np.asarray(_guessed(model(), jnp.asarray(row), width))
    passes, guess, row = 1, None, row[0]
    while len(row) - at > width:
        right = 0 if guess is None else np.cumprod(guess == row[at : at + width]).sum()
        guess, at, passes = guesses[at + right - 1], at + right + 1, passes + 1
    return passes + len(row) - at


WRAPPED = {
    "a logits processor": lambda: ProcessedDenoiser(network=model(), mask=MASK, processor=NoRepeatNGram(size=2)),
    "guidance": lambda: ProcessedDenoiser(
        network=model(), mask=MASK, cfg_scale=jnp.asarray(1.5), prompt_length=jnp.array([4, 2])
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_canvases_after_a_text_are_predicted_as_separate_ones(name):
    """With a logits processor or guidance; the network's own are in models/test_draft_and_verify.py."""

    @jax.jit
    def read(network):
        prompt, count, tokens = prompts(2, width=4), jnp.array([4, 2]), jnp.array([[6, 2], [8, 3]])
        _, cache = network.extend(network.empty_cache(2, 8), prompt.tokens, count, Causal())
        both = jnp.full(2, 2)
        said, ahead, after = network.draft_and_verify(cache, tokens, both, 3)
        causal, _ = network.extend(cache, tokens, both, Causal())
        masks, apart = jnp.full((2, 3), MASK), []
        for i in (1, 2):
            _, behind = network.extend(cache, tokens[:, :i], jnp.full(2, i), Causal())
            apart.append(network.denoise_canvas(behind, masks, jnp.ones(2)))
        index = jnp.array([[1, 4], [5, 0]])  # of both canvases
        picked = jnp.take_along_axis(jnp.concatenate(apart, axis=1), index[..., None], axis=1)
        return said.logits(), ahead.gather(index).logits(), causal.logits(), picked, after.length

    said, ahead, causal, apart, length = read(WRAPPED[name]())
    np.testing.assert_allclose(said, causal, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(ahead, apart, atol=1e-4, rtol=1e-5)
    assert length.tolist() == [6, 4]


@functools.partial(jax.jit, static_argnums=2)
def _guessed(bound, row, width):
    """int32 [S, width]: what the canvas after each token predicts to follow the next one."""
    ahead = bound.draft_and_verify(bound.empty_cache(1, row.shape[1]), row, jnp.full(1, row.shape[1]), 1 + width)[1]
    return jnp.argmax(ahead.logits()[0].reshape(row.shape[1], 1 + width, -1)[:, 1:], axis=-1)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_short_answer_takes_plain_steps(length):
    """Where the cache ends before a verification does, nothing is drafted."""
    prompt, keys = prompts(2, width=2), jax.random.split(jax.random.key(4), 2)
    plain, speculative = pair(PromptLookup(num_tokens=4), 1.0, NEVER)
    assert (generated(speculative, prompt, keys, length).tokens == generated(plain, prompt, keys, length).tokens).all()


@dataclasses.dataclass(frozen=True)
class Flatterer(Drafter):
    """Right about generated text, wrong about new text; records how often it drafted new text."""

    num_tokens: int
    num_passes: int
    asked: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def __call__(self, model, cache, text, filled):
        guess = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (self.num_tokens,)))(text, filled)
        jax.debug.callback(self.asked.append, guess[0, 0] == MASK)
        return guess


@pytest.mark.parametrize("passes, cost", [(0, 1.5), (1, 3.0)])
def test_drafts_in_vain_cost_a_small_share(passes, cost):
    """The comparison always succeeds, the verification always fails and costs more than the step it saves: altogether
    at most 1/64 of the steps, and one verification more where drafts cost no pass."""
    drafter, prompt, keys = Flatterer(3, passes), prompts(1), jax.random.split(jax.random.key(4), 1)
    speculative = pair(drafter, 1.0, NEVER, cost)[1]
    jax.block_until_ready(generated(speculative, prompt, keys, 480).tokens)
    jax.effects_barrier()
    tries = sum(map(bool, drafter.asked))
    assert tries >= 2 and tries * (cost - 1) <= 480 / 64 + (cost - 1) * (not passes)


def test_drafts_that_pay_are_kept_on():
    """Drafts that are always accepted: after the first comparison, verifications only (but for one that doesn't
    fit)."""
    length, prompt, keys = 160, prompts(1), jax.random.split(jax.random.key(4), 1)
    plain, _ = pair(DRAFTERS[0], 1.0, eos=NEVER)
    text = np.asarray(generated(plain, prompt, keys, length).tokens[0]).tolist()
    known = (*np.asarray(prompt.tokens[0, : int(prompt.length[0])]).tolist(), *text)
    speculative = pair(Prophet(known, 3), 1.0, NEVER, 1.5)[1]
    generation = generated(speculative, prompt, keys, length)
    assert generation.tokens[0].tolist() == text and generation.nfe <= 1 + 16 + length / 4 + 4


def test_drafts_that_can_never_pay_are_never_tried():
    """Three tokens at the cost of five steps: autoregression's passes, and no draft."""
    drafter, prompt, keys = Flatterer(3, 0), prompts(2), jax.random.split(jax.random.key(4), 2)
    plain, speculative = pair(drafter, 1.0, EOS, 5.0)
    generation, expected = (generated(way, prompt, keys, 40) for way in (speculative, plain))
    assert (generation.tokens == expected.tokens).all() and generation.nfe == expected.nfe
    jax.effects_barrier()
    assert not drafter.asked


def test_lookup_finds_what_followed_last_time():
    def guess(text, width=3, longest=4):
        row = jnp.asarray([text + [MASK] * 5], jnp.int32)
        return PromptLookup(num_tokens=width, max_ngram=longest)(None, None, row, jnp.array([len(text)]))[0].tolist()

    assert guess([1, 2, 3, 4, 9, 1, 2, 3]) == [4, 9, 1]  # the longest match
    assert guess([1, 2, 8, 8, 1, 2, 7, 7, 1, 2]) == [7, 7, 1]  # of equals the latest
    assert guess([5, 6, 5, 6]) == [5, 6, 5]  # round again past the end
    assert guess([7, 7, 7], width=4) == [7] * 4
    assert guess([4]) == [4, 4, 4]  # anything goes, but it stays inside


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "drafter",
    [
        MaskedDraft(mask=WORLD_MASK, num_tokens=2),
        TiDARDraft(num_tokens=1),
        TrainedDraft(num_tokens=3),
        TiDARDraft(num_tokens=2, causal=True),
    ],
    ids=str,
)
def test_the_true_denoiser_gives_the_true_distribution(drafter):
    """At temperature 1, against the exact table; accepting every draft fails the same test."""
    rows = 4_096

    def texts(text_sampler):
        oracle = OracleModel(text_sampler.slots(1, LENGTH))
        prompt = Prompt(tokens=jnp.zeros((rows, 1), jnp.int32), length=jnp.ones(rows, jnp.int32))
        generate = jax.jit(
            lambda keys: text_sampler.generate(oracle, oracle.empty(rows), prompt, keys, max_new_tokens=LENGTH)
        )
        return generate(jax.random.split(jax.random.key(1), rows)).tokens

    assert p_value(texts(Speculative(drafter=drafter, mask=WORLD_MASK, eos=NEVER))) > 1e-3
    assert p_value(texts(Gullible(drafter=drafter, mask=WORLD_MASK, eos=NEVER))) < 1e-9


class Gullible(Speculative):
    """A broken rule: every draft is accepted."""

    def accept(self, state, draft, logits, max_new_tokens):
        sure = jax.nn.one_hot(draft, logits.shape[-1]) * 1e6
        return super().accept(state, draft, logits + jnp.pad(sure, ((0, 0), (0, 1), (0, 0))), max_new_tokens)


@pytest.mark.parametrize("drafter", DRAFTERS, ids=str)
def test_expected_tokens_are_those_of_all_ways_a_draft_can_go(drafter):
    accepted = np.array(list(itertools.product([0, 1], repeat=drafter.num_tokens - drafter.sure)))
    chance = np.prod(np.where(accepted, 0.7, 0.3), axis=1)
    tokens = 1 + drafter.sure + np.cumprod(accepted, axis=1).sum(axis=1)
    assert drafter.expected_tokens(0.7) == pytest.approx((chance * tokens).sum())


@pytest.mark.parametrize(
    "bad",
    [
        lambda: PromptLookup(num_tokens=0),
        lambda: MaskedDraft(mask=3, num_tokens=0),
        lambda: TiDARDraft(num_tokens=0),
        lambda: PromptLookup(max_ngram=0),
    ],
)
def test_a_draft_of_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        bad()
