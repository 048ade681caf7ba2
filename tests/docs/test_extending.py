"""The sampler of docs/extending.md commits from left to right."""

import jax
import jax.numpy as jnp
from support.pages import example

from diffusion_lm.samplers import base


def test_half_of_the_canvas_each_of_two_steps():
    canvas = base.Canvas(
        tokens=jnp.full((1, 4), 9),
        undecided=jnp.ones((1, 4), bool),
        fixed=jnp.zeros((1, 4), bool),
        confidence=jnp.zeros((1, 4)),
        keys=jax.random.split(jax.random.key(0), 1),
        step=jnp.zeros((), jnp.int32),
    )
    sampler = example("my_package/sampler.py")["LeftToRight"](denoising_steps=2, eos=8)
    half = sampler.update(sampler.init(canvas), jnp.zeros((1, 4, 7)))
    assert (half.tokens != 9).tolist() == [[True, True, False, False]]
    assert sampler.query(half).t.tolist() == [0.5]
    assert sampler.done(sampler.update(half, jnp.zeros((1, 4, 7)))).all()
