"""Programs that stop between steps give the same text as one program: caches that grow, rows that leave."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.text_samplers import NEVER, TEXT_SAMPLERS, canvases, generate, prompts
from support.tiny import MASK, model

from diffusion_lm.inference import runner
from diffusion_lm.nn import cache as kv_cache
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.drafters import PromptLookup
from diffusion_lm.samplers.speculative import Speculative

GROWING = ["confidence", "autoregressive", "blocks", "auto"]


def driven(text_sampler, prompt, length, **rest):
    keys = jax.random.split(jax.random.key(0), len(prompt.length))
    return runner.run(text_sampler, model(), prompt, keys, max_new_tokens=length, **rest)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", TEXT_SAMPLERS)
def test_a_padded_prompt_is_the_prompt(name):
    """`pipeline` pads prompts to a few widths."""
    wide, text_sampler = prompts([5, 3], width=11), TEXT_SAMPLERS[name](eos=NEVER)
    own = Prompt(tokens=wide.tokens[:, :5], length=wide.length)
    (padded, alone) = (driven(text_sampler, prompt, 9) for prompt in (wide, own))
    assert (padded.tokens == alone.tokens).all() and padded.nfe == alone.nfe


@pytest.fixture
def short(monkeypatch):
    """Caches that begin with 8 slots; the size of each, in order."""
    sizes = []
    taken = runner._taken

    def noted(*args, slots):
        sizes.append(slots)
        return taken(*args, slots=slots)

    monkeypatch.setattr(runner, "_MIN_SLOTS", 8)
    monkeypatch.setattr(runner, "_taken", noted)
    return sizes


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", GROWING)
def test_a_cache_that_grows_changes_nothing(name, short):
    prompt, text_sampler = prompts([6, 1, 3]), TEXT_SAMPLERS[name](eos=NEVER)
    grown, plain = driven(text_sampler, prompt, 30), generate(text_sampler, prompt, 30)
    assert (grown.tokens == plain.tokens).all() and grown.nfe == plain.nfe
    assert short == sorted(short) and len(short) >= 1  # or this test would have seen no growth
    assert (grown.length == plain.length).all()


def test_a_cache_that_grows_under_drafts_changes_nothing(short):
    prompt, draw = prompts([6, 1, 3]), TEXT_SAMPLERS["autoregressive"](eos=NEVER, temperature=0.0).sampling
    text_sampler = Speculative(drafter=PromptLookup(num_tokens=2), mask=MASK, eos=NEVER, sampling=draw, break_even=1.5)
    grown, plain = driven(text_sampler, prompt, 150), generate(text_sampler, prompt, 150)
    assert (grown.tokens == plain.tokens).all() and grown.nfe == plain.nfe < 150
    assert short == [128, 156]  # from 64, in the middle of writing


def test_a_cache_is_at_most_twice_as_long_as_what_it_holds(short):
    generation = driven(
        TEXT_SAMPLERS["autoregressive"](), Prompt(tokens=jnp.full((1, 1), 5), length=jnp.ones(1, jnp.int32)), 60
    )
    held = int(generation.cache.length[0])
    assert generation.cache.slots <= max(2 * held, 8)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", GROWING)
def test_rows_that_leave_change_nothing(name):
    prompt = prompts([6, 1, 3, 2, 5, 4, 6, 1])
    keys = jax.random.split(jax.random.key(0), 8)
    left = runner.run(TEXT_SAMPLERS[name](), model(), prompt, keys, max_new_tokens=30, drop_finished=True)
    text_sampler = TEXT_SAMPLERS[name]()
    cache = model().empty_cache(8, text_sampler.slots(6, 30))
    plain = jax.jit(lambda cache: text_sampler.generate(model(), cache, prompt, keys, max_new_tokens=30))(cache)
    assert (left.tokens == plain.tokens).all() and (left.length == plain.length).all() and left.nfe == plain.nfe
    assert len(set(np.asarray(plain.length).tolist())) > 2  # rows ended at different times


def test_half_of_the_rows_gone_is_half_of_the_batch(monkeypatch):
    batches = []
    advance = runner._advance

    def noted(model, state, *rest, stage):
        batches.append(len(state.finished))
        return advance(model, state, *rest, stage=stage)

    monkeypatch.setattr(runner, "_advance", noted)
    driven(TEXT_SAMPLERS["autoregressive"](), prompts([6, 1, 3, 2, 5, 4, 6, 1]), 30, drop_finished=True)
    assert batches[0] == 8 and all(b <= a / 2 for a, b in itertools.pairwise(batches)) and batches[-1] < 8


def test_recorded_rows_do_not_leave():
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="leave"):
        runner.run(canvases(record=True), model(), prompts([6, 1, 3]), keys, max_new_tokens=8, drop_finished=True)


def test_a_cache_can_not_lose_what_it_holds():
    cache = model().empty_cache(2, 8)
    assert kv_cache.resize(cache, jnp.array([1]), 16).slots == 16
    with pytest.raises(ValueError, match="lost"):
        kv_cache.resize(cache, jnp.array([0, 1]), 4)


def test_no_masks_come_back(short):
    generation = driven(canvases(), prompts([6, 1, 3]), 30)
    written = np.arange(30)[None] < np.asarray(generation.length)[:, None]
    assert (np.asarray(generation.tokens)[written] != MASK).all()
