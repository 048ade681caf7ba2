"""Flow matching, beyond what `test_chain` asks of every process: correctors, and what a bound by rates leaves out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chain
from support.canvas import denoised
from support.oracle import MASK, blank, entropy, p_value, truth

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.flow import MaskFlow, UniformFlow
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.schedules import Cosine, Linear
from diffusion_lm.types import DenseLogits

BOTH = pytest.mark.parametrize("kind", [MaskFlow, UniformFlow])
GAP = 1.17873  # nats a text, beside 4.00422 of entropy


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_from_uniform_noise_the_best_bound_lies_above_the_entropy(schedule):
    """By the same amount under any schedule; and it is the best, as wrong predictions cost more."""
    flow = UniformFlow(mask=MASK, schedule=schedule)
    least = chain.bound(flow)
    assert abs(least - entropy() - GAP) < 1e-4
    for by in (0.05, 0.7):
        toward = lambda p, t, by=by: (1 - by) * chain.true_denoiser(p, t) + by * chain.wrong_denoiser(p, t)  # noqa: E731
        assert chain.bound(flow, 0, toward) > least + 1e-4


@pytest.mark.usefixtures("optimized")
def test_that_gap_is_what_the_paths_know_and_the_tokens_do_not():
    """One position, two pieces, p = (a, 1 - a): the bound by hand, integrated over the share u that has jumped."""
    a = np.array([0.3, 0.7])
    node, share = np.polynomial.legendre.leggauss(200)
    u, total = (node + 1) / 2, 0.0
    for x0 in range(2):
        for z in range(2):
            q = np.where(x0 == z, u, 0) + (1 - u) / 2  # q(z | x_0)
            p = [a[v] * (np.where(v == z, u, 0) + (1 - u) / 2) / (a[z] * u + (1 - u) / 2) for v in range(2)]
            cost = 1 - p[z] if z == x0 else -np.log(p[x0]) - p[z]
            total += a[x0] * float(np.sum(share / 2 * q * cost / (1 - u)))
    process, ours = UniformFlow(mask=2), 0.0
    for ui, w in zip(u, share / 2, strict=True):
        with jax.enable_x64(True):
            p = a * (ui * np.eye(2) + (1 - ui) / 2)  # [z, v]
            logits = jnp.log(jnp.asarray(p / p.sum(axis=1, keepdims=True)))[:, None]
            for x0 in range(2):
                q = np.where(np.arange(2) == x0, ui, 0) + (1 - ui) / 2
                weights = jnp.asarray(a[x0] * q * w)[:, None]
                rows = jnp.full((2, 1), x0), jnp.arange(2)[:, None], jnp.full((2, 1), 1 - ui)
                ours += float(process.nelbo(DenseLogits(values=logits), *rows, weights, 0))
    assert abs(ours - total) < 1e-6 and total > -a @ np.log(a) + 0.05


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 8])
def test_in_steps_the_bound_lies_above_what_euler_writes(num_timesteps):
    flow = UniformFlow(mask=MASK)
    for denoiser in (chain.true_denoiser, chain.wrong_denoiser):
        nll = -truth() @ np.log(chain.written(flow, num_timesteps, denoiser))
        assert chain.bound(flow, num_timesteps, denoiser) > nll - 1e-5


def test_many_steps_come_near_continuous_time():
    for denoiser in (chain.true_denoiser, chain.wrong_denoiser):
        flow = UniformFlow(mask=MASK, schedule=Cosine())
        assert abs(chain.bound(flow, 64, denoiser) - chain.bound(flow, 0, denoiser)) < 5e-3


@BOTH
@pytest.mark.parametrize("corrector", [0.0, 4.0])
def test_euler_steps_write_the_data_as_they_grow_many(kind, corrector):
    process = kind(mask=MASK, corrector=corrector, schedule=Cosine())
    few, many, more = (np.abs(chain.written(process, n) - truth()).sum() / 2 for n in (4, 32, 128))
    assert few > 3 * many > 9 * more and more < 1.5e-2


@BOTH
def test_a_strong_corrector_is_cut_to_what_steps_leave(kind):
    """Chances stay chances, and all text is clean at the end."""
    process = kind(mask=MASK, corrector=1e3)
    t = jnp.arange(1, 9, dtype=jnp.float32) / 8
    data, noise = process.jump_probabilities(t, t - 1 / 8)
    assert (data > 0).all() and (noise >= 0).all() and (data + noise <= 1 + 1e-6).all()
    assert data[0] == 1 and noise[0] == 0 and noise[1:-1].min() > 0
    assert abs(chain.written(process, 8).sum() - 1) < 1e-5


def test_from_masks_a_step_is_the_posterior():
    flow, masked = MaskFlow(mask=MASK), Absorbing(mask=MASK)
    logits = jnp.asarray(chain.wrong_denoiser(masked, 0.5), jnp.float32)
    ours, theirs = (chain.posterior(process, logits, 0.5, 0.2) for process in (flow, masked))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@BOTH
def test_the_sampler_writes_what_the_steps_say(kind):
    """Eight passes with a corrector, drawn."""
    process, rows, passes = kind(mask=MASK, corrector=3.0), 4_096, 8
    tables = jnp.asarray([chain.true_denoiser(process, 1 - i / passes) for i in range(passes)], jnp.float32)
    code = jnp.asarray([64, 16, 4, 1])[None]

    def denoise(tokens, t):
        return tables[jnp.round((1 - t) * passes).astype(jnp.int32), jnp.sum(tokens * code, axis=1)]

    sampler = Ancestral(process=process, denoising_steps=passes, eos=99)
    texts = jax.jit(lambda canvas: denoised(sampler, denoise, canvas))(blank(rows)).tokens
    assert p_value(texts, chain.written(process, passes)) > 1e-3


@pytest.mark.parametrize("corrector", [-0.1, float("nan"), float("inf")])
def test_a_corrector_that_is_none_is_refused(corrector):
    with pytest.raises(ValueError, match=r"process\.corrector"):
        dataclasses.replace(MaskFlow(), corrector=corrector)
