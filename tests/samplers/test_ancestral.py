"""Corrector steps of ancestral sampling under noise that replaces tokens: exactly, over all canvases (`chain`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chain
from support.canvas import denoised, step
from support.oracle import LENGTH, MASK, NEVER, VOCAB, blank, p_value, truth

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.mixture import Mixture
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.schedules import Cosine

PROCESSES = [Uniform(mask=MASK), Uniform(schedule=Cosine(), mask=MASK), Mixture(uniform=0.2, mask=MASK)]
every = pytest.mark.parametrize("process", PROCESSES, ids=str)
PER_STEP = 0.25


def joint(one) -> np.ndarray:
    """[256, 4, 4] by position -> [256, 256] by canvas."""
    one = one / np.maximum(one.sum(axis=-1, keepdims=True), 1e-30)
    return np.einsum("xa,xb,xc,xd->xabcd", *np.moveaxis(one, 1, 0)).reshape(256, 256)


def noised_again(process, s, t) -> np.ndarray:
    """q(x_t | x_s) [4, 4] of one position: the rows of the kernel to t that the kernel to s leaves to explain."""
    now, then = chain.kernel(process, t), chain.kernel(process, s)
    kept = (now[0, 0] - now[0, 1]) / (then[0, 0] - then[0, 1])  # what stays of a piece, noise apart
    arrives = now[0] - kept * then[0]
    return kept * np.eye(VOCAB + 1) + arrives[None]


def back(process, t, s) -> np.ndarray:
    return joint(chain.posterior(process, jnp.asarray(chain.true_denoiser(process, t), jnp.float32), t, s))


def law(process, steps, correct) -> np.ndarray:
    """[81]: the distribution after `steps` steps and `correct` corrector steps of the true denoiser."""
    canvases = chain.noised(process, 1.0)[0]
    for i in range(steps, 0, -1):
        canvases = canvases @ back(process, i / steps, (i - 1) / steps)
    a_little = PER_STEP / steps
    again = joint(noised_again(process, 0.0, a_little)[chain.CANVASES]) @ back(process, a_little, 0.0)
    canvases = canvases @ np.linalg.matrix_power(again, correct)
    return canvases.reshape((VOCAB + 1,) * LENGTH)[:VOCAB, :VOCAB, :VOCAB, :VOCAB].reshape(-1)


def error(process, steps, correct) -> float:
    return float(np.abs(law(process, steps, correct) - truth()).sum() / 2)


@every
def test_corrector_steps_help_more_than_as_many_ordinary_steps(process, steps=8):
    plain, corrected, longer, more_steps = (
        error(process, *cost) for cost in ((steps, 0), (steps, steps), (steps, 3 * steps), (2 * steps, 0))
    )
    assert corrected < 0.7 * plain and longer <= corrected < more_steps


@every
@pytest.mark.parametrize("times", [(0.0, 0.1), (0.25, 0.6), (0.25, 1.0)])
def test_added_noise_has_the_stated_distribution(process, times):
    """Composed with the earlier noise, it is the noise of the later time."""
    rows, (s, t) = 20_000, times
    expected = noised_again(process, s, t)
    np.testing.assert_allclose(chain.kernel(process, s) @ expected, chain.kernel(process, t), atol=1e-6)
    pieces = jnp.tile(jnp.array([[0, 1, 2, MASK]], jnp.int32), (rows, 1))
    keys = jax.random.split(jax.random.key(0), rows)
    xt = np.asarray(jax.jit(process.forward)(keys, pieces, jnp.full(rows, s), jnp.full(rows, t)))
    for i in range(VOCAB + (not isinstance(process, Uniform))):
        drawn = np.bincount(xt[:, i], minlength=VOCAB + 1) / rows
        np.testing.assert_allclose(drawn, expected[i], atol=4 * 0.5 / np.sqrt(rows))


@every
def test_the_sampler_has_the_distribution_of_its_steps(process):
    """8 steps, of which 4 correct; without them the distribution differs."""
    rows, steps = 4_096, 4
    times = [*(1 - i / steps for i in range(steps)), PER_STEP / steps]
    tables = jnp.asarray([chain.true_denoiser(process, t) for t in times], jnp.float32)

    def denoise(tokens, t):
        at = jnp.argmin(jnp.abs(t[:, None] - jnp.asarray(times)[None]), axis=1)
        return tables[at, jnp.sum(tokens * jnp.asarray([64, 16, 4, 1])[None], axis=1)]

    sampler = Ancestral(process=process, denoising_steps=8, eos=NEVER, corrector_steps=4)
    state = jax.jit(lambda canvas: denoised(sampler, denoise, canvas))(blank(rows))
    assert state.step == 8 and not state.undecided.any()
    assert p_value(state.tokens, law(process, steps, 4)) > 1e-3
    assert p_value(state.tokens, law(process, steps, 0)) < 1e-6


def test_noise_and_steps_back_never_draw_with_the_same_key(monkeypatch):
    used = {"forward": [], "reverse": []}
    for name, draw in (("forward", Uniform.forward), ("reverse", Uniform.reverse)):

        def recorded(self, keys, *rest, name=name, draw=draw):
            used[name].append(jax.random.key_data(keys))
            return draw(self, keys, *rest)

        monkeypatch.setattr(Uniform, name, recorded)
    sampler = Ancestral(process=PROCESSES[0], denoising_steps=4, eos=NEVER, corrector_steps=2)
    canvas = sampler.init(blank(1))
    for _ in range(4):
        canvas = step(sampler, lambda tokens, t: jnp.zeros((1, LENGTH, VOCAB)), canvas)
    # a step's noise is drawn once, though `query` and `update` both ask for it
    noise, back = (np.unique(np.concatenate(keys), axis=0) for keys in used.values())
    assert len(back) == 4 and len(noise) == 4  # of steps that correct nothing, too: unused
    assert len(np.unique(np.concatenate([noise, back]), axis=0)) == 8


def test_fixed_positions_get_no_noise():
    canvas = blank(64, fixed=np.array([[False, True, True, False]]), prompt=2)
    sampler = Ancestral(process=PROCESSES[0], denoising_steps=6, eos=NEVER, corrector_steps=5)
    said = jax.nn.one_hot(jnp.zeros((64, LENGTH), jnp.int32), VOCAB)
    state = jax.jit(lambda c: denoised(sampler, lambda tokens, t: said, c))(canvas)
    assert (state.tokens[:, 1:3] == 2).all() and (state.tokens < VOCAB).all() and state.step == 6


@pytest.mark.parametrize(
    ("process", "correct"), [(PROCESSES[0], -1), (PROCESSES[0], 4), (Absorbing(mask=MASK), 1)], ids=str
)
def test_impossible_values_are_refused_in_one_line(process, correct):
    with pytest.raises(ValueError, match="correct") as caught:
        Ancestral(process=process, denoising_steps=4, eos=NEVER, corrector_steps=correct)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("removal", ["sample", "likeliest"])
def test_a_step_of_its_own_removes_what_noise_is_left(removal):
    """From the grid's end, where nearly all is noise still, to 0."""
    sampler = Ancestral(
        process=Absorbing(mask=MASK), denoising_steps=3, eos=NEVER, begin=0.9, end=0.88, noise_removal=removal
    )
    said = jnp.log(jnp.array([0.2, 0.3, 0.5]))
    predict = lambda tokens, t: jnp.broadcast_to(said, (*tokens.shape, VOCAB))  # noqa: E731
    state, times = sampler.init(blank(500, seed=0)), []
    for _ in range(3):
        times.append(float(sampler.query(state).t[0]))
        left = np.asarray(state.undecided)
        state = step(sampler, predict, state)
    np.testing.assert_allclose(times, [0.9, 0.89, 0.88], rtol=1e-6)
    last = np.asarray(state.tokens)[left]
    assert left.mean() > 0.9 and not state.undecided.any()
    assert (last == 2).all() if removal == "likeliest" else abs((last == 2).mean() - 0.5) < 0.05


def test_cosine_times():
    sampler = Ancestral(process=Absorbing(mask=MASK), denoising_steps=4, eos=NEVER, cosine=True)
    canvas = blank(1)
    for step_number in range(4):
        t, s = sampler._times(canvas.replace(step=jnp.asarray(step_number)))
        expected = np.sin(np.pi / 2 * (1 - np.array([step_number, step_number + 1]) / 4))
        np.testing.assert_allclose([t[0], s[0]], expected, atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"begin": 0.2, "end": 0.3}, {"begin": 1.5}, {"noise_removal": "sample", "denoising_steps": 1},
        {"noise_removal": "sample", "corrector_steps": 1, "process": PROCESSES[0]},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_grids_of_times_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as caught:
        Ancestral(**{"process": Absorbing(mask=MASK), "denoising_steps": 4, "eos": NEVER} | bad)
    assert "\n" not in str(caught.value)
