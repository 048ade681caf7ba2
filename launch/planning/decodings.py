"""The decodings that the scoreboard compares, and what it keeps of each: answers, remasking statistics, frames."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_lm.build import LoadedModel
from diffusion_lm.inference import best_of_n, pipeline, presets
from diffusion_lm.objectives.base import Objective
from diffusion_lm.planning.remasking_stats import RemaskingStats, answer_history, remasking_stats
from diffusion_lm.planning.results import AUTOREGRESSIVE, Prediction, Setting
from diffusion_lm.planning.tasks.base import Example
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.remasking import Cap
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import FixedCount
from diffusion_lm.visualize.frames import END_OF_TEXT

BATCH = 250  # prompts of a batch, or answers where one of several is kept
HISTORY_POSITIONS = 2**26  # of a batch's history at most: 8 bytes each
ETA = 0.2  # ReMDM's cap: the largest probability that a step of `remask` masks a committed token again
SPAN = 2  # positions that a round of `revise` masks again
ELBO_SAMPLES = 8  # noise samples of an ELBO

log = logging.getLogger("diffusion_lm.scoreboard")


class Evaluation(NamedTuple):
    """The results of one setting.

    remasking  None for decodings that never change a committed token
    frames     one test's answer after each denoising step, a text per position, "" where it is masked; None where it
               isn't shown
    """

    setting: Setting
    predictions: list[Prediction]
    remasking: RemaskingStats | None = None
    frames: list[list[str]] | None = None


def _sampling(model: LoadedModel, temperature: float = 0.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, suppressed=model.tokenizer.suppressed)


def _confidence(model: LoadedModel, steps: int) -> BlockDiffusion:
    return presets.confidence(model, sampling=_sampling(model), canvas_length=0, denoising_steps=steps, record=True)


def _entropy(model: LoadedModel, steps: int) -> BlockDiffusion:
    pace = FixedCount(score="entropy")
    return presets.confidence(
        model, sampling=_sampling(model), canvas_length=0, denoising_steps=steps, schedule=pace, record=True
    )


def _random(model: LoadedModel, steps: int) -> BlockDiffusion:
    return presets.ancestral(model, sampling=_sampling(model), canvas_length=0, denoising_steps=steps, record=True)


def _remask(model: LoadedModel, steps: int) -> BlockDiffusion:
    remask = Cap(eta=ETA)
    return presets.remasking(
        model, sampling=_sampling(model), canvas_length=0, denoising_steps=steps, remask=remask, record=True
    )


def _revise(model: LoadedModel, steps: int) -> BlockDiffusion | None:
    """Half of the steps fill the canvas, the others revise it; None where they are too few for a round."""
    first = steps // 2
    rounds = (steps - first) // (min(SPAN, first) + 1)
    return presets.revised(model, _confidence(model, first), rounds=rounds, span=SPAN) if first and rounds else None


# Each commits the most probable tokens. They differ in which positions a step commits, and which it masks again.
DECODINGS: dict[str, Callable[[LoadedModel, int], BlockDiffusion | None]] = {
    "confidence": _confidence,
    "entropy": _entropy,
    "random": _random,
    "remask": _remask,
    "revise": _revise,
}
REMASKING = ("remask", "revise")  # decodings that change committed tokens


def kept(count: int) -> tuple[str, ...]:
    """The names of best-of-N and of the majority vote over `count` answers; none for 0."""
    return (f"best of {count}", f"vote of {count}") if count else ()


def settings(objective: Objective, decodings: Sequence[str], steps: Sequence[int], best_of: int) -> list[Setting]:
    """The settings that apply to a network trained with an objective: autoregressive, and decodings by their steps."""
    autoregressive = [AUTOREGRESSIVE] if objective.trains_ar else []
    if not objective.layout.denoises:
        return autoregressive
    return autoregressive + [Setting(name, total) for name in (*decodings, *kept(best_of)) for total in steps]


def evaluate(
    model: LoadedModel,
    tests: Sequence[Example],
    wanted: Sequence[Setting],
    *,
    best_of: int = 0,
    shown: int | None = None,
) -> Iterator[Evaluation]:
    """Answers all tests in each setting, one setting after the other.

    An answer's canvases share its denoising steps, and so do the answers of which one is kept. A setting with too few
    steps for that is skipped, with a line in the log.

    Args:
      model: trained on the tests' task.
      tests: examples to answer.
      wanted: settings.
      best_of: answers of which best-of-N and the majority vote keep one; 0: neither.
      shown: index of the test whose frames are kept; None: of none.
    """
    length, objective, done = model.config.data.task.max_lengths[1] + 1, model.config.objective, set()
    canvases = _confidence(model, 1).max_canvases(length) if objective.layout.denoises else 1
    for setting in wanted:
        several = setting.decoding in kept(best_of)
        share = setting.denoising_steps // (canvases * (best_of if several else 1))
        if setting == AUTOREGRESSIVE:
            yield _autoregressive(model, tests, length)
        elif setting in done:
            continue
        elif share and several:
            sampler = presets.confidence(model, sampling=_sampling(model, 1.0), canvas_length=0, denoising_steps=share)
            both = _best_of_n(model, tests, setting.denoising_steps, sampler, best_of, length)
            done |= {found.setting for found in both}
            yield from (found for found in both if found.setting in wanted)
        elif sampler := DECODINGS[setting.decoding](model, share) if share else None:
            yield _denoised(model, tests, setting, sampler, length, shown)
        else:
            log.info("%s: %d denoising steps are too few for an answer", *setting)


def _autoregressive(model: LoadedModel, tests: Sequence[Example], length: int) -> Evaluation:
    sampler, found = presets.autoregressive(model, sampling=_sampling(model)), []
    for first, some in _batches(tests, BATCH):
        answer = pipeline.generate(model, sampler, [test.prompt for test in some], max_new_tokens=length, seed=first)
        found += _predictions(some, answer.texts, AUTOREGRESSIVE, int(answer.generation.nfe))
    return Evaluation(AUTOREGRESSIVE, found)


def _denoised(
    model, tests: Sequence[Example], setting: Setting, sampler: BlockDiffusion, length: int, shown: int | None
) -> Evaluation:
    """One answer to each test, with its history."""
    positions = sampler.sampler.denoising_steps * sampler.canvas_length * sampler.max_canvases(length)
    size = min(BATCH, max(HISTORY_POSITIONS // positions, 1))
    found, remasking, frames = [], RemaskingStats(*[0] * 7), None
    for first, some in _batches(tests, size):
        answer = pipeline.generate(model, sampler, [test.prompt for test in some], max_new_tokens=length, seed=first)
        new = _predictions(some, answer.texts, setting, int(answer.generation.nfe))
        history = answer_history(answer.generation, answer.prompt_ids, length, model.tokenizer.mask)
        remasking += remasking_stats(history, _correct(model, new, length), model.tokenizer.mask)
        if shown is not None and first <= shown < first + len(some):
            frames = _texts(model, history[shown - first])
        found += new
    return Evaluation(setting, found, remasking if setting.decoding in REMASKING else None, frames)


def _best_of_n(
    model, tests: Sequence[Example], steps: int, sampler: BlockDiffusion, count: int, length: int
) -> list[Evaluation]:
    """Of `count` sampled answers the one that the network itself scores highest, and the most frequent one."""
    ar = model.config.objective.trains_ar
    if ar:
        score, evaluations = best_of_n.log_likelihood, 1
    else:
        score, evaluations = lambda *both: best_of_n.elbo(*both, draws=ELBO_SAMPLES), ELBO_SAMPLES
    best, votes = (Evaluation(Setting(name, steps), []) for name in kept(count))
    for first, some in _batches(tests, max(BATCH // count, 1)):
        prompts = [test.prompt for test in some]
        chosen = best_of_n.best_of(model, sampler, prompts, count, score=score, max_new_tokens=length, seed=first)
        nfe, texts = count * int(chosen.output.generation.nfe), chosen.output.texts
        most = [best_of_n.majority_vote(texts[row * count : (row + 1) * count]).text for row in range(len(some))]
        best.predictions.extend(_predictions(some, chosen.texts, best.setting, nfe + count * evaluations))
        votes.predictions.extend(_predictions(some, most, votes.setting, nfe))
    return [best, votes]


def _batches(tests: Sequence[Example], size: int) -> Iterator[tuple[int, Sequence[Example]]]:
    """Batches, each with the index of its first test, which is its seed."""
    return ((first, tests[first : first + size]) for first in range(0, len(tests), size))


def _predictions(tests: Sequence[Example], texts: Sequence[str], setting: Setting, nfe: int) -> list[Prediction]:
    return [Prediction(*test, text, *setting, nfe) for test, text in zip(tests, texts, strict=True)]


def _correct(model: LoadedModel, predictions: Sequence[Prediction], length: int) -> np.ndarray:
    """int32 [rows, length]: a correct answer and its end of text, then the mask.

    The prediction itself where it is correct, else the example's answer.
    """
    task, tokenizer = model.config.data.task, model.tokenizer
    correct = np.full((len(predictions), length), tokenizer.mask, np.int32)
    for row, one in zip(correct, predictions, strict=True):
        text = one.prediction if task.verify(one.prompt, one.prediction) else one.answer
        ids = [*tokenizer.encode(text), tokenizer.eos]
        row[: len(ids)] = ids
    return correct


def _texts(model: LoadedModel, frames: np.ndarray) -> list[list[str]]:
    tokenizer = model.tokenizer
    ids = [int(i) for i in np.unique(frames) if i != tokenizer.mask]
    text = dict(zip(ids, tokenizer.pieces(ids), strict=True)) | {tokenizer.mask: "", tokenizer.eos: END_OF_TEXT}
    return [[text[int(i)] for i in frame] for frame in frames]
