"""Revised spans: which, when they are kept, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.canvas import denoised, recorded, step
from support.oracle import MASK, NEVER, conditionals, truth

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.revision import Revision
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import Threshold

BLANK, END = 5, 4
blank = functools.partial(oracle.blank, mask=BLANK)


def said(tokens, t):
    """Logits that depend on the whole canvas."""
    table = np.random.default_rng(0).normal(scale=2.0, size=(BLANK + 1, 40, BLANK))
    table = jnp.asarray(table, jnp.float32)[tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]]
    return jnp.sum(table, axis=1, keepdims=True) + table


def inner(passes=3, *, kind="even", temperature=1.0, eos=END):
    draw = SamplingParams(temperature=temperature, suppressed=(0,))
    if kind == "ancestral":
        return Ancestral(process=Absorbing(mask=BLANK), denoising_steps=passes, eos=eos, sampling=draw)
    schedule = {"schedule": Threshold(threshold=0.4)} if kind == "threshold" else {}
    return Confidence(denoising_steps=passes, eos=eos, sampling=draw, **schedule)


def revision(sampler, rounds=3, span=2):
    return Revision(sampler=sampler, rounds=rounds, span=span, mask=BLANK)


@functools.cache
def driver(sampler):
    record = lambda s: (s.tokens, s.confidence)  # noqa: E731
    return jax.jit(lambda canvas: recorded(sampler, said, canvas, record))


def test_the_least_certain_span_is_masked():
    """Of neighbouring free positions: fixed ones between them don't count, nor repeats of an end of text."""
    state = revision(inner(), span=2).init(blank(1, 8))
    state = state.replace(
        tokens=jnp.array([[1, 2, 3, 1, 2, END, END, END]]),
        undecided=jnp.zeros((1, 8), bool),
        fixed=jnp.array([[0, 0, 1, 0, 0, 0, 0, 0]], bool),
        confidence=jnp.array([[0.9, 0.3, 1.0, 0.4, 0.5, 0.3, 0.0, 0.0]]),
    )
    begun = revision(inner(), span=2).masked(state)
    assert begun.span[0].tolist() == [False, True, False, True, False, False, False, False]
    assert begun.tokens[0].tolist() == [1, BLANK, 3, BLANK, 2, END, END, END]
    assert (begun.undecided == begun.span).all() and (begun.old == state.tokens).all()
    assert (jax.random.key_data(begun.keys) != jax.random.key_data(state.keys)).any()  # each round draws anew
    again = revision(inner(), span=2).masked(begun.replace(tokens=state.tokens, confidence=state.confidence))
    assert np.flatnonzero(again.span[0]).tolist() == [4, 5]  # the next, since that one was tried
    whole = revision(inner(), span=9).masked(state)
    assert np.flatnonzero(whole.span[0]).tolist() == [0, 1, 3, 4, 5]


def planted(tokens, t):
    """Certain of 2 everywhere once there is some text; uncertain and wrong at two positions before."""
    none = jnp.all(tokens == BLANK, axis=1)[:, None]
    wrong = none & (jnp.isin(jnp.arange(tokens.shape[1], dtype=jnp.int32), jnp.array([3, 4]))[None])
    token = jnp.where(wrong, 1, 2)
    return jnp.where(wrong, 1.0, 5.0)[..., None] * jax.nn.one_hot(token, BLANK)


def test_a_mistake_of_the_first_step_is_corrected():
    sampler = inner(1, temperature=0.0, eos=NEVER)
    first, mended = (
        jax.jit(lambda canvas, s=s: denoised(s, planted, canvas))(blank(1, 8))
        for s in (revision(sampler, 0), revision(sampler, 1))
    )
    assert first.tokens[0].tolist() == [2, 2, 2, 1, 1, 2, 2, 2]
    assert mended.tokens[0].tolist() == [2] * 8
    assert mended.confidence[0, 3] > 0.9 and mended.step == 1 + 1 + 1


def test_no_rounds_is_the_inner_sampler_alone():
    sampler = inner(3)
    plain = jax.jit(lambda canvas: denoised(sampler, said, canvas))(blank(3, 6))
    revised = driver(revision(sampler, rounds=0))(blank(3, 6))[0]
    assert (plain.tokens == revised.tokens).all() and revised.step == plain.step


def test_a_round_costs_its_span_and_one_more_pass():
    for span, passes, cost in ((2, 3, 3), (4, 3, 4)):
        sampler = revision(inner(passes, eos=NEVER), rounds=2, span=span)
        assert sampler.denoising_steps == passes + 2 * cost
        assert driver(sampler)(blank(3, 6))[0].step == sampler.denoising_steps


def test_with_all_spans_tried_it_stops():
    """At temperature 0 nothing changes: each span is tried once on the same text."""
    sampler = revision(inner(6, temperature=0.0, eos=NEVER), rounds=500, span=2)
    state = driver(sampler)(blank(2, 6))[0]
    assert sampler.done(state).all() and state.step < sampler.denoising_steps / 4


def test_a_round_keeps_the_more_probable_text():
    """In a plain Python loop that equals the compiled one: each comparison, worked out by hand."""
    sampler = revision(inner(3, temperature=1.5, eos=NEVER), rounds=8, span=2)
    canvas = blank(3, 6)
    compiled, (tokens, _) = driver(sampler)(canvas)
    state, one_step = sampler.init(canvas), jax.jit(functools.partial(step, sampler, said))
    kept = {True: 0, False: 0}
    for made in range(sampler.denoising_steps):
        was, state = state, one_step(state)
        assert (tokens[made] == state.tokens).all()
        if was.undecided.any() or int(was.round) == 0:
            continue
        assert not (was.tokens == BLANK).any()
        log_p = np.asarray(jax.nn.log_softmax(said(jnp.where(was.span, BLANK, was.tokens), 0).at[..., 0].set(-np.inf)))
        for row in range(3):
            span, new, old = (np.asarray(a)[row] for a in (was.span, was.tokens, was.old))
            scores = [log_p[row, span, text[span]].sum() for text in (new, old)]
            found = np.asarray(state.old if int(state.round) > int(was.round) else state.tokens)[row]
            assert (found == (new if scores[0] > scores[1] else old)).all()
            kept[bool(scores[0] > scores[1])] += 1
    assert sampler.done(state).all() and (compiled.tokens == state.tokens).all()
    assert min(kept.values()) > 2


def test_a_row_alone_is_the_row_in_a_batch():
    """Also where rows are full after different numbers of steps."""
    sampler = revision(inner(6, kind="threshold"), rounds=3)
    batch = driver(sampler)(blank(4, 6))[0]
    for row in (0, 2):
        alone = jax.tree.map(lambda a, row=row: a[row : row + 1] if a.ndim else a, blank(4, 6))
        assert (driver(sampler)(alone)[0].tokens[0] == batch.tokens[row]).all()


@given(st.sampled_from(["threshold", "ancestral"]), st.sampled_from([(1, 1), (6, 3)]), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_no_mask_is_left_and_fixed_tokens_stay(kind, size, seed):
    (width, passes), rng = size, np.random.default_rng(seed)
    fixed = rng.random((2, width)) < rng.random()
    prompt = np.where(fixed, rng.integers(END, size=fixed.shape), BLANK).astype(np.int32)
    state, _ = driver(revision(inner(passes, kind=kind, eos=-1)))(blank(2, width, fixed=fixed, prompt=prompt))
    final = np.asarray(state.tokens)
    assert (final < BLANK).all() and (final == prompt)[fixed].all() and not ((final == 0) & ~fixed).any()
    assert not np.asarray(state.undecided).any() and (np.asarray(state.confidence) > 0).all()


def test_texts_get_likelier():
    """With the true denoiser, after a first step that sampled all tokens at once."""
    denoise = lambda tokens, t: conditionals(tokens)  # noqa: E731
    means = []
    for rounds in (0, 6):
        sampler = Revision(sampler=Confidence(denoising_steps=1, eos=NEVER), rounds=rounds, span=2, mask=MASK)
        go = jax.jit(lambda c, s=sampler: denoised(s, denoise, c))
        code = np.asarray(go(blank(2_048, 4, mask=MASK)).tokens) @ np.array([27, 9, 3, 1])
        means.append(np.log(truth())[code].mean())
    assert means[0] + 0.25 < means[1]


@pytest.mark.parametrize(("rounds", "span"), [(-1, 2), (2, 0)])
def test_impossible_values_are_refused_in_one_line(rounds, span):
    with pytest.raises(ValueError, match="rounds") as caught:
        revision(inner(), rounds, span)
    assert "\n" not in str(caught.value)
