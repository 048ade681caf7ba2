"""ReMDM's public code (arXiv 2503.00307) on its stored random network: each stored step replayed with our posterior.

A step there draws the token with the largest probability / (1e-10 - log(u + 1e-10)) from stored uniforms u; the same
rule on our probabilities must give the same canvas. Its times run from 1 down to 1e-5, and so do those of the replay.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from support import parity
from support.stored_draws import NucleusWithoutCrossing, chosen

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Canvas
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Loop, Remasking, Rescale
from diffusion_lm.samplers.sampling_params import SamplingParams

LAST_TIME = 1e-5
ETA = {"remdm-cap": 0.1, "remdm-rescale": 0.3, "remdm-loop": 0.05}  # not stored; no other share replays these runs


@pytest.mark.parametrize("which", ["model", "true"])
def test_reference_network_reproduces_stored_logits(stored, network, which):
    sigma = stored["forward/sigma"] * (which == "true")
    logits = network.logits(stored["forward/xt"], sigma)
    np.testing.assert_allclose(logits, stored[f"forward/backbone_logits_{which}_sigma"], atol=2e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardBackward(Cap):
    """The plain corrector they compare with: sigma = (alpha_s - alpha_t) / alpha_t, too much in the last step."""

    num_steps: int

    def sigma(self, t, most, standing, probability):
        return ((1 - LAST_TIME) / self.num_steps / jnp.maximum(1 - t, 1e-9))[:, None]


def schedule_of(kind: str, num_steps: int, *, share: float = 1.0):
    """The remasking schedule of a run; `share` multiplies its eta."""
    return {
        "remdm-cap": lambda: Cap(eta=share * ETA["remdm-cap"]),
        "remdm-rescale": lambda: Rescale(eta=share * ETA["remdm-rescale"]),
        "remdm-loop": lambda: Loop(eta=share * ETA["remdm-loop"]),
        "remdm-conf": ConfidenceBased,
        "forward-backward": lambda: ForwardBackward(num_steps=num_steps),
    }[kind]()


def sampling_of(run) -> SamplingParams:
    return NucleusWithoutCrossing(top_p=float(run["top_p"])) if run["top_p"] else SamplingParams()


def runs(kind: str):
    pattern = rf"sampler/(?P<kind>{kind})(_topp(?P<top_p>[\d.]+))?_s(?P<steps>\d+)"
    return pytest.mark.parametrize("run", parity.found("remdm", pattern))


@pytest.fixture(scope="module")
def logits_of(stored, network):
    """Logits of ids that are not the mask, before every step of a run: float64 [steps, B, L, mask id]."""

    @functools.cache
    def logits(run: str):
        before, mask = stored[f"{run}/x_in"], int(stored["mask_index"])
        return np.stack([network.logits(x, np.zeros(len(x)))[..., :mask] for x in before])

    return logits


def num_differences(stored, logits_of, run, remask, sampling, overshoots=()) -> np.ndarray:
    """int [steps]: at how many positions our posterior draws another token than ReMDM's code."""
    mask, num_steps = int(stored["mask_index"]), int(run["steps"])
    sampler = Remasking(
        process=Absorbing(mask=mask), denoising_steps=num_steps, eos=-1, remask=remask, sampling=sampling
    )
    before, after, times, uniforms = (
        stored[f"{run[0]}/{part}"] for part in ("x_in", "x_out", "t", "tape/torch.rand_like")
    )
    confidence, differences = jnp.zeros(before[0].shape), []
    for k, (x, expected, u) in enumerate(zip(before, after, uniforms, strict=True)):
        x, t = jnp.asarray(x), jnp.asarray(times[k][:, 0])
        at, to = remask.times(t, t - (1 - LAST_TIME) / num_steps)
        if k in overshoots:
            to = 1 - (1 - t + (1 - LAST_TIME) / num_steps) * remask.alpha_on / (1 - remask.t_on)
        logits = sampling.sharpened(jnp.asarray(logits_of(run[0])[k], jnp.float32))
        everywhere = jnp.ones(x.shape, bool)
        canvas = Canvas(
            tokens=x,
            undecided=everywhere,
            fixed=~everywhere,
            confidence=confidence,
            keys=None,
            step=jnp.array(k),
        )
        law = sampler.probabilities(logits, x, at, to, sampler.sigma(canvas, t, at, to))
        differences.append(int((chosen(law, u) != expected).sum()))
        confidence = sampler.confidence(canvas, jnp.asarray(expected), logits)
    return np.array(differences)


@runs("remdm-cap|remdm-rescale|remdm-conf|forward-backward")
def test_every_step_replays(stored, logits_of, run):
    schedule = schedule_of(run["kind"], int(run["steps"]))
    assert (num_differences(stored, logits_of, run, schedule, sampling_of(run)) == 0).all()


@runs("remdm-loop")
def test_a_loop_replays_but_for_the_step_that_enters_it(stored, logits_of, run):
    """One step begins before t_on and ends after it: theirs overshoots alpha_on, ours stops there."""
    num_steps = int(run["steps"])
    schedule, t = schedule_of(run["kind"], num_steps), stored[f"{run[0]}/t"][:, 0, 0]
    entering = np.flatnonzero((t > schedule.t_on) & (t - (1 - LAST_TIME) / num_steps <= schedule.t_on))
    differences = num_differences(stored, logits_of, run, schedule, sampling_of(run))
    assert set(np.flatnonzero(differences)) <= set(entering)
    assert (num_differences(stored, logits_of, run, schedule, sampling_of(run), overshoots=entering) == 0).all()


@runs("remdm-cap|remdm-rescale|remdm-loop")
def test_another_share_does_not_replay(stored, logits_of, run):
    """The replays above notice a share that is a tenth off."""
    wrong = [schedule_of(run["kind"], int(run["steps"]), share=share) for share in (0.9, 1.1)]
    assert sum(num_differences(stored, logits_of, run, one, sampling_of(run)).sum() for one in wrong) > 2


@runs("remdm-conf")
def test_another_rule_or_temperature_does_not_replay(stored, logits_of, run):
    """The replay by confidence notices a fixed share, and logits that are a tenth sharper or flatter."""
    cap, conf = (schedule_of(kind, int(run["steps"])) for kind in ("remdm-cap", "remdm-conf"))
    assert num_differences(stored, logits_of, run, cap, SamplingParams()).sum() > 2
    tempered = [SamplingParams(temperature=temperature) for temperature in (0.9, 1.1)]
    assert sum(num_differences(stored, logits_of, run, conf, one).sum() for one in tempered) > 2
