"""ReMDM's public code (arXiv 2503.00307) on its stored random network: each stored pass replayed with our law.

A pass there draws the token with the largest probability / (1e-10 - log(u + 1e-10)) from stored uniforms u; the same
rule on our probabilities must give the same canvas. Times run down to 1e-5 there; passes are replayed between those.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import dit

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Canvas
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Loop, Remasking, Rescale
from diffusion_lm.samplers.sampling_params import SamplingParams

MASK, PASSES, EPS = 60, 16, 1e-5


@pytest.mark.parametrize("which", ["model", "true"])
def test_the_network_is_the_stored_one(stored, weights, which):
    sigma = stored["forward/sigma"] * (which == "true")
    logits = dit.logits(weights, stored["forward/xt"], sigma)
    np.testing.assert_allclose(logits, stored[f"forward/backbone_logits_{which}_sigma"], atol=2e-5)


class ForwardBackward(Cap):
    """The plain corrector they compare with: sigma = (alpha_s - alpha_t) / alpha_t, too much in the last pass."""

    def sigma(self, t, most, standing, probability):
        return ((1 - EPS) / PASSES / jnp.maximum(1 - t, 1e-9))[:, None]


class Peer(SamplingParams):
    """Their nucleus leaves out the token that crosses p, ours has it: top_p, as they draw."""

    def sharpened(self, logits):
        p = jax.nn.softmax(logits, axis=-1)
        order = jnp.argsort(-p, axis=-1)
        within = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1) <= self.top_p
        kept = jnp.take_along_axis(within.at[..., 0].set(True), jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(kept, logits, -jnp.inf)


RUNS = {  # what the peer was given: its eta isn't stored with the runs, but no other replays them
    "remdm-cap": (Cap(eta=0.1), SamplingParams()),
    "remdm-cap_topp0.9": (Cap(eta=0.1), Peer(top_p=0.9)),
    "remdm-rescale": (Rescale(eta=0.3), SamplingParams()),
    "remdm-conf": (ConfidenceBased(), SamplingParams()),
    "remdm-loop": (Loop(eta=0.05), SamplingParams()),
    "forward-backward": (ForwardBackward(), SamplingParams()),
}


def replayed(stored, weights, name, remask, draw=SamplingParams(), overshoots=()):  # noqa: B008  (frozen)
    """int [passes]: at how many of the 2 x 24 positions our law draws another token than the peer."""
    sampler = Remasking(process=Absorbing(mask=MASK), passes=PASSES, eos=-1, remask=remask, draw=draw)
    before, after, times, uniforms = (
        stored[f"sampler/{name}_s16/{part}"] for part in ("x_in", "x_out", "t", "tape/torch.rand_like")
    )
    probability, differ = jnp.zeros(before[0].shape), []
    for k, (x, expected, u) in enumerate(zip(before, after, uniforms, strict=True)):
        x, t = jnp.asarray(x), jnp.asarray(times[k][:, 0])
        at, to = remask.times(t, t - (1 - EPS) / PASSES)
        if k in overshoots:
            to = 1 - (1 - t + (1 - EPS) / PASSES) * remask.alpha_on / (1 - remask.t_on)
        said = dit.logits(weights, before[k], np.zeros(2))[..., :MASK]
        logits = draw.sharpened(jnp.asarray(said, jnp.float32))
        everywhere = jnp.ones(x.shape, bool)
        canvas = Canvas(
            tokens=x,
            undecided=everywhere,
            context_mask=~everywhere,
            confidence=probability,
            keys=None,
            passes=jnp.array(k),
        )
        law = sampler.probabilities(logits, x, at, to, sampler.sigma(canvas, t, at, to))
        drawn = np.argmax(np.asarray(law, np.float64) / (1e-10 - np.log(u + 1e-10)), axis=-1)
        differ.append(int((drawn != expected).sum()))
        probability = sampler._written(jnp.asarray(expected), canvas, logits)
    return np.array(differ)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "remdm-loop"])
def test_every_pass_replays(stored, weights, name):
    assert (replayed(stored, weights, name, *RUNS[name]) == 0).all()


def test_a_loop_replays_but_for_the_pass_that_enters_it(stored, weights):
    """Pass 7 begins before t_on and ends behind it. There they go on past alpha_on, up to alpha = 1, and we stop."""
    differ = replayed(stored, weights, "remdm-loop", *RUNS["remdm-loop"])
    assert (np.flatnonzero(differ) == [7]).all()
    assert (replayed(stored, weights, "remdm-loop", *RUNS["remdm-loop"], overshoots=[7]) == 0).all()


def test_another_share_does_not_replay(stored, weights):
    """Nor do sharper logits, so that the replays above say something."""
    for name, wrong in (("cap", Cap(eta=0.09)), ("rescale", Rescale(eta=0.28)), ("conf", Cap(eta=0.1))):
        assert replayed(stored, weights, f"remdm-{name}", wrong).sum() > 2
    warm = replayed(stored, weights, "remdm-conf", ConfidenceBased(), SamplingParams(temperature=0.9))
    assert warm.sum() > 2
