"""Total variation of each canvas sampler from the truth, with the true denoiser and many steps, for each noise.
Corrector steps (`test_ancestral`) and noise on embeddings (`test_embedding_flow`) have tests of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chain
from support.canvas import denoised
from support.oracle import MASK, NEVER, TEXTS, blank, truth

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.flow import MaskFlow, UniformFlow
from diffusion_lm.processes.mixture import Mixture
from diffusion_lm.processes.score import AbsorbingScore, UniformScore
from diffusion_lm.processes.state_dependent import StateDependentMasking
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Loop, Remasking, Rescale
from diffusion_lm.samplers.renoising import Renoising
from diffusion_lm.samplers.revision import Revision
from diffusion_lm.samplers.unmasking import EntropyBound, Threshold

pytestmark = pytest.mark.usefixtures("optimized")
ROWS, PASSES = 8_192, 64
LEVEL = float(np.sqrt(2 / np.pi / ROWS) / 2 * np.sqrt(truth() * (1 - truth())).sum())  # of as many draws from the truth
MASKS, UNIFORM, MIXTURE = Absorbing(mask=MASK), Uniform(mask=MASK), Mixture(uniform=0.2, mask=MASK)
TOKENWISE = StateDependentMasking(powers=(0.5, 1.0, 2.0), mask=MASK)
FLOWS, SCORES = [MaskFlow(mask=MASK), UniformFlow(mask=MASK)], [AbsorbingScore(mask=MASK), UniformScore(mask=MASK)]


def distance(sampler, process, passes: int = PASSES) -> float:
    """Total variation between 8,192 samples and the world's distribution."""
    tables = [chain.true_denoiser(process, i / passes) + chain.logits_of_even(process) for i in range(1, passes + 1)]
    tables = jnp.maximum(jnp.asarray(np.stack(tables), jnp.float32), -60.0)

    def denoise(tokens, t):
        at = jnp.clip(jnp.round(t * passes).astype(jnp.int32) - 1, 0, passes - 1)
        return tables[at, jnp.sum(tokens * jnp.asarray([64, 16, 4, 1])[None], axis=1)]

    whole = jax.jit(lambda canvas: denoised(sampler, denoise, canvas))
    code = np.asarray(whole(blank(ROWS, seed=0)).tokens) @ np.array([27, 9, 3, 1])
    return float(np.abs(np.bincount(code, minlength=len(TEXTS)) / ROWS - truth()).sum() / 2)


def confidence(**options):
    return Confidence(denoising_steps=PASSES, eos=NEVER, **options)


@pytest.mark.cases(3)
@pytest.mark.parametrize("process", [MASKS, TOKENWISE, UNIFORM, *FLOWS, *SCORES], ids=str)
def test_the_reverse_process_is_exact_in_the_limit(process):
    assert distance(Ancestral(process=process, denoising_steps=PASSES, eos=NEVER), process) < 1.25 * LEVEL


def test_a_mixture_needs_more_steps():
    """Its noise falls with the root of the remaining time: 0.03 is still missing after 64 steps."""
    assert LEVEL < distance(Ancestral(process=MIXTURE, denoising_steps=PASSES, eos=NEVER), MIXTURE) < 0.06


@pytest.mark.parametrize("remask", [Cap(eta=0.02), Rescale(eta=0.05), Loop(eta=0.02)], ids=str)
def test_remasking_is_exact_in_the_limit(remask):
    assert distance(Remasking(process=MASKS, denoising_steps=PASSES, eos=NEVER, remask=remask), MASKS) < 1.25 * LEVEL


def revision():
    return Revision(sampler=confidence(), rounds=4, span=2, mask=MASK)


def renoising(process):
    return Renoising(process=process, denoising_steps=PASSES, eos=NEVER)


BIASED = {  # samplers that favour likely texts, however many steps: total variation from the truth, to 0.02
    "remask by confidence": (
        Remasking(process=MASKS, denoising_steps=PASSES, eos=NEVER, remask=ConfidenceBased()),
        MASKS,
        0.06,
    ),
    "confidence, one a step": (confidence(), MASKS, 0.50),
    "confidence, threshold 0.5": (confidence(schedule=Threshold(threshold=0.5)), MASKS, 0.50),
    "confidence, entropy bound 0.1": (confidence(schedule=EntropyBound(bound=0.1)), MASKS, 0.04),
    "revision": (revision(), MASKS, 0.63),
    "renoising, uniform": (renoising(UNIFORM), UNIFORM, 0.42),
    "renoising, mixture": (renoising(MIXTURE), MIXTURE, 0.42),
}


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", BIASED)
def test_the_bias_of_the_others(name):
    sampler, process, stated = BIASED[name]
    assert abs(distance(sampler, process) - stated) < 0.02
