"""Remasking: the exact distribution of every step with the true denoiser; ends of text, masks and keys."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.canvas import denoised, recorded
from support.canvas import step as step_by_hand
from support.oracle import LENGTH, MASK, NEVER, VOCAB, blank, conditionals, p_value, truth

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Loop, Remasking, Rescale
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.schedules import Cosine, Linear

CANVASES = jnp.asarray(list(itertools.product(range(VOCAB + 1), repeat=LENGTH)), jnp.int32)  # [256, 4]
KINDS = [Cap(eta=0.1), Rescale(eta=0.3), Rescale(eta=1.0), Loop(eta=0.02)]
MIXED = [Cap(eta=0.1), Loop(eta=0.5), ConfidenceBased()]


def remasking(remask, passes, *, schedule=Linear(), eos=NEVER, **rest):  # noqa: B008  (frozen)
    return Remasking(
        process=Absorbing(schedule=schedule, mask=MASK), denoising_steps=passes, eos=eos, remask=remask, **rest
    )


def step_by_step(sampler) -> np.ndarray:
    """[steps, 256]: the distribution of the canvas after each step. Not for schedules that depend on confidence."""
    state = blank(len(CANVASES)).replace(tokens=CANVASES)
    logits = conditionals(CANVASES)

    @jax.jit
    def matrix(k):
        t = jnp.full(len(CANVASES), 1 - k / sampler.denoising_steps)
        at, to = sampler.remask.times(t, t - 1 / sampler.denoising_steps)
        to = jnp.where(k + 1 >= sampler.denoising_steps, 0.0, to)
        law = sampler.probabilities(logits, CANVASES, at, to, sampler.sigma(state, t, at, to))
        return functools.reduce(lambda a, b: (a[:, :, None] * b[:, None]).reshape(len(a), -1), jnp.moveaxis(law, 1, 0))

    law, laws = np.eye(len(CANVASES))[-1], []
    for k in range(sampler.denoising_steps):
        law = law @ np.asarray(matrix(k), np.float64)
        laws.append(law)
    return np.array(laws)


def texts(law) -> np.ndarray:
    return law.reshape((VOCAB + 1,) * LENGTH)[:VOCAB, :VOCAB, :VOCAB, :VOCAB].reshape(-1)


def error(sampler) -> float:
    """Total variation between samples and the truth."""
    return float(np.abs(texts(step_by_step(sampler)[-1]) - truth()).sum() / 2)


def share_masked(laws) -> np.ndarray:
    return laws @ np.mean(np.asarray(CANVASES) == MASK, axis=1)


class Unlimited(Cap):
    """Remasks more than allowed."""

    def sigma(self, t, most, standing, confidence):
        return jnp.full_like(most, self.eta)


@pytest.mark.cases(3)
@pytest.mark.parametrize("remask", KINDS, ids=str)
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_many_steps_give_the_truth(remask, schedule):
    """The error falls with the steps, in the end as their root (a loop's to some eta): tokens that are unmasked
    together cause it."""
    errors = [error(remasking(remask, n, schedule=schedule)) for n in (8, 64, 512)]
    assert errors[0] > 2 * errors[1] > 3 * errors[2] and errors[2] < 0.02


@pytest.mark.parametrize("remask", KINDS, ids=str)
def test_masks_stay_on_their_schedule_however_many_are_remasked(remask):
    """Theorem 3.1: the share of masks after each step is 1 - alpha, as without remasking."""
    passes = 20
    laws, s = step_by_step(remasking(remask, passes, schedule=Cosine())), 1 - jnp.arange(1, passes + 1) / passes
    _, at = remask.times(s + 1 / passes, s)
    expected = np.append(np.asarray(Cosine().one_minus_alpha(at))[:-1], 0.0)
    if isinstance(remask, Loop):  # ends behind t_off, in its first pass beyond it
        laws, expected = laws[:-2], expected[:-2]
    np.testing.assert_allclose(share_masked(laws), expected, atol=2e-5)


def test_remasking_more_than_allowed_is_noticed():
    laws = step_by_step(remasking(Unlimited(eta=0.3), 512))
    assert np.abs(texts(laws[-1]) - truth()).sum() / 2 > 0.05
    assert share_masked(laws)[-20] > 0.2


def test_no_remasking_is_ancestral_sampling():
    none, same, all_of_it = (
        texts(step_by_step(remasking(k, 5))[-1]) for k in (Cap(eta=0.0), Rescale(eta=0.0), KINDS[2])
    )
    np.testing.assert_allclose(none, same, atol=1e-6)
    assert np.abs(none - all_of_it).sum() / 2 > 0.05
    assert p_value(cleared(Ancestral(process=Absorbing(mask=MASK), denoising_steps=5, eos=NEVER)), none) > 1e-3


def cleared(sampler, rows=4_096):
    denoise = lambda tokens, t: conditionals(tokens)  # noqa: E731
    return jax.jit(lambda canvas: denoised(sampler, denoise, canvas))(blank(rows)).tokens


@pytest.mark.parametrize("remask", [Rescale(eta=1.0), Loop(eta=0.02)], ids=str)
def test_the_sampler_has_the_distribution_of_its_steps(remask):
    sampler = remasking(remask, 6)
    assert p_value(cleared(sampler), texts(step_by_step(sampler)[-1])) > 1e-3


@pytest.mark.usefixtures("optimized")
def test_confidence_based_remasking_is_nearly_exact():
    assert p_value(cleared(remasking(ConfidenceBased(), 300))) > 1e-3
    assert p_value(cleared(remasking(ConfidenceBased(), 8))) < 1e-9


# Apart from its distribution.

WIDE, PIECES, END = 7, 5, 4


def said(tokens, t):
    """Logits that depend on the whole canvas and the time."""
    table = np.random.default_rng(0).normal(scale=1.5, size=(PIECES + 1, 40, PIECES))
    table = jnp.asarray(table, jnp.float32)[tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]]
    return jnp.sum(table, axis=1, keepdims=True) + table * (1 + t[:, None, None])


def sampler_of(remask, passes, eos=END):
    process = Absorbing(mask=PIECES)
    return Remasking(
        process=process, denoising_steps=passes, eos=eos, remask=remask, sampling=SamplingParams(suppressed=(0,))
    )


@functools.cache
def driver(remask, passes):
    sampler = sampler_of(remask, passes)
    record = lambda s: (s.tokens, s.confidence, s.undecided)  # noqa: E731
    return jax.jit(lambda canvas: recorded(sampler, said, canvas, record))


@given(st.sampled_from(MIXED), st.sampled_from([(1, 1), (6, 9)]), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_no_mask_is_left_and_fixed_tokens_stay(remask, size, seed):
    (width, passes), rng = size, np.random.default_rng(seed)
    fixed = rng.random((2, width)) < rng.random()
    prompt = np.where(fixed, rng.integers(PIECES, size=fixed.shape), PIECES).astype(np.int32)
    state, history = driver(remask, passes)(blank(2, width, PIECES, fixed=fixed, prompt=prompt))
    made, final = int(state.step), np.asarray(state.tokens)
    assert made == (passes if (~fixed).any() else 0)  # nothing is closed before the last pass
    assert (final < PIECES).all() and not ((final == 0) & ~fixed).any() and not np.asarray(state.undecided).any()
    for tokens, confidence, opened in zip(*(np.asarray(part)[:made] for part in history), strict=True):
        assert (tokens == prompt)[fixed].all() and not (opened & fixed).any()
        ends = (tokens == END) & ~fixed
        beyond = (np.cumsum(ends, axis=1) - ends > 0) & ~fixed
        assert (tokens[beyond] == END).all()
        nothing = (tokens == PIECES) | beyond
        assert (confidence[nothing & ~fixed] == 0).all() and (confidence <= 1).all()
        assert (confidence > 0)[~nothing & ~ends & ~fixed].all()  # an end may be what repeated one taken back


@pytest.mark.parametrize("remask", MIXED[1:], ids=str)
def test_the_compiled_loop_is_a_plain_loop_and_a_row_alone_is_the_row_in_a_batch(remask):
    sampler, canvas = sampler_of(remask, 12), blank(3, WIDE, PIECES)
    go = jax.jit(lambda c: recorded(sampler, said, c, lambda s: s.tokens))
    compiled, record = go(canvas)
    step, state, remasked_count = jax.jit(functools.partial(step_by_hand, sampler, said)), canvas, 0
    for made in range(12):
        assert not sampler.done(state).any()
        was, state = state, step(state)
        remasked_count += int(((was.tokens != PIECES) & (state.tokens == PIECES)).sum())
        assert (record[made] == state.tokens).all()
    assert sampler.done(state).all() and (compiled.tokens == state.tokens).all()
    assert remasked_count > 0
    alone = go(jax.tree.map(lambda a: a[1:2] if a.ndim else a, canvas))[0]
    assert (alone.tokens[0] == state.tokens[1]).all()
    other = go(canvas.replace(keys=jax.random.split(jax.random.key(9), 3)))[0]
    assert (other.tokens != state.tokens).any()


def test_an_end_that_is_remasked_opens_its_own_position():
    """A text that ends at once: the end is remasked, and its repetition is now the text's end."""
    canvas = blank(1, 4, PIECES).replace(tokens=jnp.full((1, 4), END), step=jnp.array(1))
    state = step_by_hand(sampler_of(Unlimited(eta=1.0), 3), said, canvas)
    assert state.tokens[0].tolist() == [PIECES, END, END, END] and state.undecided.all()
    t = jnp.full(1, 0.5)
    for remask in (Cap(), ConfidenceBased()):
        assert (sampler_of(remask, 2).sigma(canvas, t, t, t / 2) > 0).tolist() == [[True, False, False, False]]


def test_a_finished_row_is_left_alone():
    canvas = blank(2, 6, PIECES)
    closed = canvas.replace(undecided=canvas.undecided.at[0].set(False), tokens=canvas.tokens.at[0].set(2))
    state = driver(KINDS[0], 9)(closed)[0]
    assert (state.tokens[0] == 2).all() and (state.tokens[1] < PIECES).all()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Cap(eta=1.5),
        lambda: Rescale(eta=-0.1),
        lambda: Loop(t_on=0.1, t_off=0.2),
        lambda: Loop(alpha_on=1.0),
        lambda: sampler_of(Cap(), 0),
        lambda: Remasking(process=Uniform(mask=MASK), denoising_steps=3, eos=-1, remask=Cap()),
    ],
)
def test_impossible_values_are_refused_in_one_line(bad):
    with pytest.raises(ValueError, match=r"share|loop|denoising_steps|ancestral") as caught:
        bad()
    assert "\n" not in str(caught.value)
