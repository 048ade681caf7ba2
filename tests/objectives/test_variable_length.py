"""Texts that end: a bound must pay for where, and a sampler must end them as often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.canvas import denoised

from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.base import Canvas
from diffusion_lm.types import Batch, DenseLogits

A, END, MASK = 0, 1, 2
TEXTS = {"short": [END, END], "long": [A, END]}  # each half of the time, on a canvas of 2
ROWS = 40_000


def denoise(canvas, t=None):
    """The true denoiser: position 0 is END half of the time, position 1 always."""
    del t
    first = jnp.broadcast_to(jnp.array([0.5, 0.5]), (canvas.shape[0], 2))
    second = jnp.broadcast_to(jnp.array([0.0, 1.0]), first.shape)
    return jnp.log(jnp.stack([first, second], axis=1) + 1e-30)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bound_of_either_text_is_log_2(text):
    tokens = jnp.broadcast_to(jnp.array(TEXTS[text], jnp.int32), (ROWS, 2))
    before_end = jnp.cumsum(tokens == END, axis=1) - (tokens == END) == 0
    batch = Batch(
        tokens=tokens,
        segment_ids=jnp.ones_like(tokens),
        positions=jnp.broadcast_to(jnp.arange(2)[None], tokens.shape),
        context_mask=jnp.zeros(tokens.shape, bool),
        loss_mask=before_end,
    )
    loss = ELBO()(lambda x, t, **_: DenseLogits(values=denoise(x)), Absorbing(mask=MASK), jax.random.key(0), batch)
    np.testing.assert_allclose(loss["canvas"].sum / ROWS, np.log(2), rtol=0.02)  # 1 / t has a heavy tail
    assert loss["canvas"].weight == before_end.sum()


def test_ancestral_sampling_ends_half_of_the_texts_at_once():
    canvas = Canvas(
        tokens=jnp.full((ROWS, 2), MASK),
        undecided=jnp.ones((ROWS, 2), bool),
        fixed=jnp.zeros((ROWS, 2), bool),
        confidence=jnp.zeros((ROWS, 2)),
        keys=jax.random.split(jax.random.key(0), ROWS),
        step=jnp.zeros((), jnp.int32),
    )
    sampler = Ancestral(process=Absorbing(mask=MASK), denoising_steps=16, eos=END)
    cleared = jax.jit(lambda c: denoised(sampler, denoise, c))(canvas)
    assert abs((cleared.tokens[:, 0] == A).mean() - 0.5) < 0.01  # four standard deviations
    assert (cleared.tokens[:, 1] == END).all()
