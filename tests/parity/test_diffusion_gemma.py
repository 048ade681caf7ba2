"""DiffusionGemma's sampler: a stored run, step by step, from its stored logits and draws."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import parity

from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.base import Canvas
from diffusion_lm.samplers.renoising import Renoising
from diffusion_lm.samplers.unmasking import EntropyBound


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stored(Renoising):
    """drawn, noise: int32 [steps, B, K], what is drawn in each step in place of random numbers."""

    drawn: np.ndarray
    noise: np.ndarray

    def _draw(self, state, logits):
        tokens = jnp.asarray(self.drawn[int(state.step)])
        return tokens, jnp.ones(tokens.shape)

    def _noise(self, state, count):
        return jnp.asarray(self.noise[int(count)])


@pytest.mark.parametrize("run", parity.found("diffusion_gemma", r"sampler/default_s(?P<steps>\d+)"))
def test_steps_of_the_entropy_bound_sampler(stored, config, run):
    settings, steps = json_of("generation_config.json"), int(run["steps"])
    io = {name.removeprefix(f"{run[0]}/"): array for name, array in stored.items() if name.startswith(run[0])}
    starts = io["canvas_start"]
    for canvas, start in enumerate(dict.fromkeys(starts.tolist())):
        (here,) = np.nonzero(starts == start)
        first = io["initial_canvases"][canvas]
        sampler = Stored(
            process=Uniform(mask=config["text_config"]["vocab_size"]),
            denoising_steps=steps,
            eos=-1,
            schedule=EntropyBound(bound=settings["sampler_config"]["entropy_bound"]),
            max_temperature=settings["t_max"],
            min_temperature=settings["t_min"],
            entropy_threshold=settings["confidence_threshold"],
            sharpened_conditioning=True,
            drawn=io["drawn"][here],
            noise=io["random"][here],
        )
        state = began(sampler, first)
        for step, k in enumerate(here):
            going = ~np.asarray(sampler.done(state))
            np.testing.assert_array_equal(np.asarray(state.tokens)[going], io["canvas"][k][going])
            np.testing.assert_allclose(sampler._temperature(state), io["temperature"][k], rtol=1e-6)
            logits = jnp.asarray(io["logits"][k])
            np.testing.assert_allclose(sampler.conditioning(state, logits), logits / io["temperature"][k], rtol=1e-5)
            state = sampler.update(state, logits)
            ended = np.asarray(sampler.done(state))
            last = step + 1 == steps
            assert (ended == (io["done"][k] | last)).all()
            np.testing.assert_array_equal(np.asarray(state.tokens)[ended], io["argmax"][k][ended])


def began(sampler, tokens):
    """The state before the first step, all of the canvas being noise."""
    every = jnp.ones(tokens.shape, bool)
    canvas = Canvas(
        tokens=jnp.asarray(tokens),
        undecided=every,
        fixed=~every,
        confidence=jnp.zeros(tokens.shape),
        keys=jax.random.split(jax.random.key(0), len(tokens)),
        step=jnp.zeros((), jnp.int32),
    )
    return dataclasses.replace(sampler, noise=tokens[None].repeat(sampler.denoising_steps + 1, 0)).init(canvas)


def json_of(name):
    return json.loads((parity.folder("diffusion_gemma") / name).read_text())
