"""Renoising: a canvas that may change until it is stable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.canvas import recorded
from support.oracle import blank

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.renoising import Renoising
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import EntropyBound

VOCAB, WIDTH, NEVER = 7, 6, 99


def sampler(**options):
    return Renoising(**{"process": Uniform(mask=VOCAB), "denoising_steps": 8, "eos": NEVER} | options)


def cleared(one, denoise, canvas, record=None):
    return jax.jit(lambda c: recorded(one, denoise, c, record))(canvas)


def said(peaks, sharpness):
    """Logits that prefer token peaks[i] at position i, whatever the canvas."""
    return lambda tokens, t: jnp.broadcast_to(
        sharpness * jax.nn.one_hot(jnp.asarray(peaks), VOCAB)[None], (*tokens.shape, VOCAB)
    )


def test_a_certain_network_needs_two_steps_and_its_likeliest_canvas_is_committed():
    """One to predict the canvas, one to see that it is stable."""
    peaks = [3, 1, 4, 1, 5, 2]
    state, _ = cleared(sampler(), said(peaks, 50.0), blank(4, WIDTH))
    assert state.step == 2 and (state.tokens == jnp.array(peaks)[None]).all() and not state.undecided.any()
    assert (state.confidence > 0.999).all()


@pytest.mark.parametrize("stability", [0, 1, 3])
def test_a_canvas_is_committed_once_it_has_been_the_likeliest_for_so_many_steps(stability):
    state, _ = cleared(sampler(stability=stability), said([3, 1, 4, 1, 5, 2], 50.0), blank(4, WIDTH))
    assert state.step == stability + 1


def test_an_uncertain_network_takes_all_steps_and_ends():
    state, _ = cleared(sampler(), said([3, 1, 4, 1, 5, 2], 1.0), blank(4, WIDTH))
    assert state.step == 8 and not state.undecided.any() and (state.tokens == jnp.array([3, 1, 4, 1, 5, 2])[None]).all()


def test_a_canvas_that_is_never_stable_ends_too():
    def restless(tokens, t):  # wants another token than the one that stands
        return 50.0 * jax.nn.one_hot((tokens + 1) % VOCAB, VOCAB)

    state, _ = cleared(sampler(entropy_threshold=100.0), restless, blank(4, WIDTH))
    assert not state.undecided.any() and (state.tokens < VOCAB).all()


def test_fixed_tokens_stay_and_noise_is_text():
    canvas = blank(3, WIDTH)
    fixed = jnp.zeros_like(canvas.fixed).at[:, 1].set(True)
    canvas = canvas.replace(fixed=fixed, undecided=~fixed, tokens=jnp.where(fixed, 6, canvas.tokens))
    _, seen = cleared(sampler(), said([3, 1, 4, 1, 5, 2], 1.0), canvas, record=lambda s: s.tokens)
    assert (seen[..., 1] == 6).all() and (seen < VOCAB).all()


def test_tokens_within_the_entropy_bound_are_kept_and_the_rest_is_noise():
    """Positions 0 and 1 are certain and kept in every step; the others are uniform."""
    logits = jnp.zeros((WIDTH, VOCAB)).at[0, 3].set(60.0).at[1, 4].set(60.0)
    one = sampler(schedule=EntropyBound(bound=0.1), denoising_steps=30)
    denoise = lambda tokens, t: jnp.broadcast_to(logits[None], (*tokens.shape, VOCAB))  # noqa: E731
    _, (seen, confidence) = cleared(one, denoise, blank(200, WIDTH), record=lambda s: (s.tokens, s.confidence))
    middle, certain = np.asarray(seen[5:25]), np.asarray(confidence[5:25])
    assert (middle[..., 0] == 3).all() and (middle[..., 1] == 4).all()
    assert (certain[..., :2] > 0.99).all()
    kept = certain[..., 2:] > 0
    assert (kept.sum(axis=-1) <= 1).all()  # the first one beyond the bound: entropies before it sum to nothing
    counts = np.bincount(middle[..., 2:][~kept], minlength=VOCAB)
    assert np.abs(counts / counts.sum() - 1 / VOCAB).max() < 0.02


@pytest.mark.usefixtures("optimized")
def test_the_temperature_falls():
    """The first step has temperature 0.8, the last but one nearly 0.4."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2, 1e-9, 1e-9, 1e-9, 1e-9]))
    one = sampler(schedule=EntropyBound(bound=1e9), denoising_steps=50)
    denoise = lambda tokens, t: jnp.broadcast_to(logits, (*tokens.shape, VOCAB))  # noqa: E731
    _, seen = cleared(one, denoise, blank(2_000, WIDTH), record=lambda s: s.tokens)
    for n, temperature in ((0, 0.8), (48, 0.4 + 0.4 * 2 / 50)):
        share = np.bincount(np.asarray(seen[n]).ravel(), minlength=VOCAB) / seen[n].size
        assert np.abs(share - jax.nn.softmax(logits / temperature)).max() < 0.015


def test_after_an_end_of_text_the_end_is_repeated():
    state, _ = cleared(sampler(eos=4), said([3, 1, 4, 1, 5, 2], 50.0), blank(2, WIDTH))
    assert state.tokens[0].tolist() == [3, 1, 4, 4, 4, 4]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: sampler(denoising_steps=0),
        lambda: sampler(process=Absorbing(mask=VOCAB)),
        lambda: sampler(max_temperature=0.3),
        lambda: sampler(min_temperature=0.0),
        lambda: sampler(entropy_threshold=-1.0),
        lambda: sampler(stability=-1),
        lambda: sampler(sampling=SamplingParams(top_k=3)),
    ],
)
def test_impossible_values_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        bad()
    assert "\n" not in str(error.value)
