"""Approximate caches: exact if every step computes all positions; each policy computes what it must; text as usual."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from support.approximate_cache import (
    CANVAS,
    LENGTH,
    NEVER,
    NO_TEXT,
    POLICIES,
    approximate,
    confidence,
    exact,
    generate,
    prompts,
)
from support.canvas import step
from support.tiny import EOS, MASK, VOCAB, model

from diffusion_lm.samplers.approximate_cache import ApproximateCacheSampler
from diffusion_lm.samplers.base import Canvas, fold_in_rows
from diffusion_lm.samplers.cache_policy import DelayedCache, DualCache, PrefixCache
from diffusion_lm.samplers.unmasking import EntropyBound, Factor, Threshold


@pytest.fixture(params=POLICIES)
def policy(request):
    return POLICIES[request.param]


# Nothing is stale.


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("whole", "temperature"),
    [
        (PrefixCache(block_size=CANVAS, refresh_every=1), 1.0),
        (DualCache(block_size=99, refresh_every=1), 1.0),
        (DelayedCache(refresh_every=1), 1.0),
        (DelayedCache(refresh_every=1), 0.0),
    ],
)
def test_refreshed_every_step_it_is_exact(whole, temperature):
    for seed in range(3):
        ours = generate(approximate(whole, temperature=temperature), prompts(), seed, layers=2)
        theirs = generate(exact(temperature=temperature), prompts(), seed, layers=2)
        assert (ours.tokens == theirs.tokens).all() and (ours.length == theirs.length).all()
        assert ours.nfe == theirs.nfe and ours.positions_computed == ours.nfe * CANVAS


@pytest.mark.parametrize("schedule", [Threshold(threshold=0.5), Factor(factor=2.0), EntropyBound(bound=2.0)])
def test_every_schedule_is_exact_when_refreshed(schedule):
    ours = generate(approximate(DelayedCache(refresh_every=1), schedule=schedule), prompts())
    assert (ours.tokens == generate(exact(schedule=schedule), prompts()).tokens).all()


@pytest.mark.cases(1)
@pytest.mark.parametrize(("kind", "temperature"), [(PrefixCache, 1.0), (DualCache, 0.0)])
def test_refreshed_every_step_blocks_follow_one_another(kind, temperature):
    """As full passes in a Python loop: blocks from the prompt's end on, each with a share of the steps."""
    prompt, sampler = prompts(), confidence(eos=NEVER, temperature=temperature)
    ours = generate(approximate(kind(block_size=4, refresh_every=1), eos=NEVER, temperature=temperature), prompt)
    for row, start in enumerate([6, 1, 3]):
        canvas, steps = begun(prompt, row), sampler.denoising_steps
        blocks = -(-(CANVAS - start) // 4)
        for block in range(blocks):
            later = max(CANVAS - start - 4 * (block + 1), 0)
            due = steps - max(later * steps // (CANVAS - start), blocks - block - 1)
            here = canvas.undecided & ((np.arange(CANVAS) - start) // 4 == block)[None]
            while here.any():
                by_then = dataclasses.replace(sampler, denoising_steps=due)  # as if the canvas ended here
                after = step(by_then, full_pass, canvas.replace(undecided=here))
                canvas = after.replace(undecided=canvas.undecided & (after.tokens == MASK))
                here &= canvas.undecided
        assert (ours.tokens[row] == canvas.tokens[0, start : start + LENGTH]).all()


_read_all = jax.jit(lambda bound, tokens, t: bound.denoise_canvas(bound.empty_cache(len(tokens), 0), tokens, t))
full_pass = functools.partial(_read_all, model())


def begun(prompt, row=slice(None), seed=0):
    """Canvases with prompts of 6, 1 and 3 tokens, as `BlockDiffusion` starts them."""
    fixed = jnp.arange(CANVAS, dtype=jnp.int32)[None] < prompt.length[:, None]
    tokens = jnp.where(fixed, jnp.pad(prompt.tokens, ((0, 0), (0, CANVAS - 6))), MASK)
    keys = fold_in_rows(jax.random.split(jax.random.key(seed), len(tokens)), 0)
    rows = jnp.atleast_1d(jnp.arange(len(tokens))[row])
    return Canvas(
        tokens=tokens[rows],
        undecided=~fixed[rows],
        fixed=fixed[rows],
        confidence=fixed[rows].astype(jnp.float32),
        keys=keys[rows],
        step=jnp.zeros((), jnp.int32),
    )


# What a step computes.


@struct.dataclass
class Notes:
    """A cache that records the token with which each position was last computed, and whether the last pass computed
    it."""

    tokens: jax.Array
    now: jax.Array


@struct.dataclass
class Noting:
    """A network with random logits that records its inputs."""

    def forward_positions(self, cache, tokens, at, t):
        length = cache.tokens.shape[1]
        rows = jnp.arange(len(at), dtype=jnp.int32)[:, None]
        logits = jax.random.normal(jax.random.key(1), (*at.shape, VOCAB)) + jax.nn.one_hot(tokens, VOCAB)
        now = jnp.zeros((len(at), length), bool).at[rows, at].set(True, mode="drop")
        return logits, Notes(tokens=cache.tokens.at[rows, at].set(tokens, mode="drop"), now=now)


@functools.partial(jax.jit, static_argnums=0)
def one_step(sampler, network, state, cache):
    """The state and the cache after one step, in the narrowest variant that is wide enough."""

    def go(variant, state, cache):
        query = variant.query(state)
        logits, cache = network.forward_positions(cache, query.tokens, query.positions, query.t)
        return variant.update(state, logits), cache

    variants = sampler.variants(state.tokens.shape[1])
    if len(variants) == 1:
        return go(variants[0], state, cache)
    return jax.lax.switch(sampler.variant(state), [functools.partial(go, one) for one in variants], state, cache)


def steps_of(policy, *, eos=NEVER, length=13, fixed=0.3, denoising_steps=13, seed=0):
    """(canvas before a step, tokens computed before, positions that the step computes, canvas after it), step by step;
    some positions are fixed, anywhere."""
    rng, rows = np.random.default_rng(seed), 3
    fixed = jnp.asarray(rng.random((rows, length)) < fixed)
    canvas = Canvas(
        tokens=jnp.where(fixed, jnp.asarray(rng.integers(3, VOCAB - 1, size=(rows, length)), jnp.int32), MASK),
        undecided=~fixed,
        fixed=fixed,
        confidence=fixed.astype(jnp.float32),
        keys=jax.random.split(jax.random.key(seed), rows),
        step=jnp.zeros((), jnp.int32),
    )
    sampler = ApproximateCacheSampler(
        sampler=confidence(eos=eos, denoising_steps=denoising_steps), policy=policy, mask=MASK
    )
    state, cache = sampler.init(canvas), Notes(tokens=jnp.full((rows, length), -1), now=~fixed & fixed)
    while not sampler.done(state).all():
        was, before = state, cache
        state, cache = one_step(sampler, Noting(), state, cache)
        yield was, before.tokens, cache.now, state


@pytest.mark.cases(6)
@pytest.mark.parametrize("policy", [*POLICIES.values(), DualCache(block_size=4, refresh_every=3)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_committed_or_has_changed_is_computed(policy, seed):
    """No step commits what it doesn't compute, or leaves a changed token stale."""
    for was, read, now, state in steps_of(policy, seed=seed):
        going = was.undecided.any(axis=1, keepdims=True)
        assert (now | (state.tokens == was.tokens)).all()
        assert (now | (read == was.tokens) | ~going).all()
        assert now.all(where=going) or was.step % (policy.refresh_every or 99)
        assert not (now & ~going).any()  # a row that is done asks for nothing
    assert not (state.tokens == MASK).any() and (state.tokens == was.tokens).all(where=was.fixed)


def test_positions_closed_by_an_end_of_text_are_computed_again():
    for policy in (PrefixCache(block_size=4), DelayedCache()):
        closed = 0
        for was, read, now, state in steps_of(policy, eos=5, seed=2):
            assert (now | (read == was.tokens) | ~was.undecided.any(axis=1, keepdims=True)).all()
            closed += int((state.tokens == 5).sum() - (was.tokens == 5).sum() > 1)
        assert closed


def test_blocks_are_computed_whole_and_in_order():
    for was, _, now, state in steps_of(DualCache(block_size=4)):
        for row in range(3):
            if was.undecided[row].any():
                at = (np.arange(13) - np.argmin(was.fixed[row])) // 4
                block = at[np.argmax(was.undecided[row])]
                assert now[row].all() or (now[row] == (at == block)).all()
                assert (at[np.asarray(was.undecided[row] & ~state.undecided[row])] == block).all()


def test_positions_computed():
    """16 undecided in 4 blocks, 8 steps: the first of a block computes all; widths are rounded up to quarters."""
    read = {}
    for name, policy in POLICIES.items():
        *_, (_, _, _, state) = steps_of(policy, length=16, fixed=0.0, denoising_steps=8)
        read[name] = int(state.positions_computed)
    assert read["dual"] == 4 * (16 + 4)
    assert read["prefix"] == (16 + 16) + (16 + 12) + (16 + 8) + (16 + 4)
    assert read["delayed"] == 16 + 16 + 16 + 12 + 12 + 8 + 8 + 4  # two more a pass, and those of the last once more


@pytest.mark.cases(1)
@pytest.mark.parametrize("policy", [PrefixCache(block_size=4), DelayedCache()], ids=str)
def test_in_one_layer_only_a_position_s_own_token_goes_stale(policy):
    """Its keys depend on nothing else, so that computing what has changed is exact."""
    assert texts_the_same(policy, layers=1) == 1.0


def test_in_two_layers_predictions_go_stale():
    """Otherwise these tests would see no cache at all."""
    assert texts_the_same(DualCache(block_size=4), layers=2) < 1.0


def texts_the_same(policy, layers):
    """The share of tokens equal to those of the same sampler when every step computes everything."""
    writers = (approximate(dataclasses.replace(policy, refresh_every=refresh)) for refresh in (0, 1))
    texts = [
        [generate(text_sampler, prompts(), seed, layers=layers).tokens for seed in range(6)] for text_sampler in writers
    ]
    return np.mean(np.array(texts[0]) == np.array(texts[1]))


# Text as of other samplers.


def test_only_text_is_returned_and_nothing_after_its_end(policy):
    ended = 0
    for seed in range(8):
        generation = generate(approximate(policy), prompts(), seed)
        for tokens, length in zip(np.asarray(generation.tokens), np.asarray(generation.length), strict=True):
            assert not np.isin(tokens[:length], (*NO_TEXT, EOS, MASK)).any()
            assert (tokens[length:] == MASK).all()
            ended += length < LENGTH
    assert ended >= 2  # or this test would have seen no end


@pytest.mark.cases(2)
def test_a_row_alone_is_the_row_in_a_ragged_batch(policy):
    """Each row has blocks, and full passes, of its own."""
    text_sampler = approximate(policy)
    for seed in range(3):
        batch = generate(text_sampler, prompts(), seed)
        for row in (1, 2):
            alone = generate(text_sampler, prompts(), seed, rows=slice(row, row + 1))
            assert (alone.tokens[0] == batch.tokens[row]).all() and alone.positions_computed <= batch.positions_computed


def test_the_compiled_loop_is_a_plain_loop():
    prompt, policy = prompts(), DualCache(block_size=4)
    sampler = ApproximateCacheSampler(sampler=confidence(), policy=policy, mask=MASK)
    state, cache, made = sampler.init(begun(prompt)), model().empty_cache(3, CANVAS), 0
    while not sampler.done(state).all():
        (state, cache), made = one_step(sampler, model(), state, cache), made + 1
    compiled = generate(approximate(policy), prompt)
    at = np.asarray(prompt.length)[:, None] + np.arange(LENGTH)
    text = np.take_along_axis(np.asarray(state.tokens), at, axis=1)
    returned = np.arange(LENGTH)[None] < np.asarray(compiled.length)[:, None]
    assert (text == compiled.tokens)[returned].all()
    assert compiled.nfe == made and compiled.positions_computed == state.positions_computed


def test_a_suffix_stays():
    suffix = [MASK, 7, MASK, MASK, 8]
    generation = generate(approximate(DualCache(block_size=4)), prompts(suffix=suffix))
    assert (generation.length > 4).all() and (generation.tokens[:, jnp.array([1, 4])] == jnp.array([[7, 8]])).all()


def test_history_holds_each_step():
    plain, recorded = (
        generate(approximate(DualCache(block_size=4), record=record), prompts()) for record in (False, True)
    )
    assert (plain.tokens == recorded.tokens).all() and recorded.history.steps.tolist() == [plain.nfe]
    last = np.asarray(recorded.history.tokens[0, int(plain.nfe) - 1])
    assert (last[1, 1 : 1 + plain.length[1]] == plain.tokens[1, : plain.length[1]]).all()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: DualCache(block_size=0),
        lambda: PrefixCache(refresh_every=-1),
        lambda: DelayedCache(refresh_every=-1),
        lambda: approximate(DualCache(block_size=2), denoising_steps=7),
        lambda: dataclasses.replace(approximate(DelayedCache()), align=1),
        lambda: generate(dataclasses.replace(approximate(DelayedCache()), canvas_length=15), prompts()),
    ],
)
def test_impossible_values_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        bad()
    assert "\n" not in str(error.value)
