"""Editing replaces tokens that stand where another is certain enough, and stops when none is."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.canvas import denoised, recorded
from support.oracle import blank

from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.editing import Editing
from diffusion_lm.samplers.sampling_params import SamplingParams

VOCAB = MASK = 5
FIRST, THEN = 1, 3


def changing(certainty):
    """Predicts FIRST everywhere while there is a mask, and THEN with this probability once there is none."""

    def said(tokens, t):
        full = jnp.all(tokens != MASK, axis=1)[:, None, None]
        token, p = jnp.where(full, THEN, FIRST), jnp.where(full, certainty, 0.9)
        here = jnp.arange(VOCAB)[None, None] == token
        logits = jnp.log(jnp.where(here, p, (1 - p) / (VOCAB - 1)))
        return jnp.broadcast_to(logits, (*tokens.shape, VOCAB))

    return said


def editing(threshold=0.5, most=4):
    inner = Confidence(denoising_steps=6, eos=-1, sampling=SamplingParams(temperature=0.0))
    return Editing(sampler=inner, threshold=threshold, max_editing_steps=most)


def canvas():
    return blank(2, 6, MASK, fixed=jnp.zeros((2, 6), bool).at[1, :2].set(True), prompt=2)


def test_what_stands_is_replaced_but_for_what_is_fixed():
    state = denoised(editing(), changing(0.8), canvas())
    assert (state.tokens[0] == THEN).all() and state.tokens[1].tolist() == [2, 2, *[THEN] * 4]
    assert int(state.step) == 6 + 2  # unmasked, edited once, and seen to stand


def test_what_is_not_certain_enough_stands():
    state = denoised(editing(threshold=0.85), changing(0.8), canvas())
    assert (state.tokens[0] == FIRST).all() and int(state.step) == 6 + 1


def test_editing_ends_in_time():
    def restless(tokens, t):
        return 9.0 * (jnp.arange(VOCAB)[None, None] == ((tokens + 1) % VOCAB)[..., None])

    for most in (0, 1, 4):
        state = denoised(editing(most=most), restless, canvas())
        assert int(state.step) == 6 + most and (state.tokens < VOCAB).all()


def test_a_row_that_is_settled_stays():
    _, tokens = recorded(editing(), changing(0.8), canvas(), lambda state: (state.tokens, state.settled))
    texts, settled = map(np.asarray, tokens)
    for row in range(2):
        (after,) = np.nonzero(settled[:, row])
        assert len({tuple(text) for text in texts[after, row] if text.any()}) == 1


@pytest.mark.parametrize("bad", [{"threshold": 1.5}, {"most": -1}])
def test_impossible_values_are_refused(bad):
    with pytest.raises(ValueError, match=r"must|probability"):
        editing(**bad)
