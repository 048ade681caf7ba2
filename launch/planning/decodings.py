"""The decodings that the scoreboard compares, and what it keeps of each: answers, take-backs, the passes of one."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_lm.build import LoadedModel
from diffusion_lm.inference import best_of_n, presets
from diffusion_lm.objectives.base import Objective
from diffusion_lm.planning.remasking_stats import TakeBacks, recorded, take_backs
from diffusion_lm.planning.results import TOKENS, Prediction, Way
from diffusion_lm.planning.tasks.base import Example
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.remasking import Cap
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import FixedCount
from diffusion_lm.visualize.frames import END_OF_TEXT

BATCH = 250  # prompts at a time, or answers where one of several is kept
CELLS = 2**26  # of a recording: 8 bytes each
ETA = 0.2  # of the standing tokens: what a pass of `remask` takes back at most
SPAN = 2  # positions that a round of `revise` writes again
DRAWS = 8  # of noise that a bound is the mean of

log = logging.getLogger("diffusion_lm.scoreboard")


class Asked(NamedTuple):
    """What one way of writing gave. takebacks: None where nothing can be taken back. frames: one test's answer after
    each pass, a piece a position, "" where nothing stands; None where it isn't to be shown."""

    way: Way
    predictions: list[Prediction]
    takebacks: TakeBacks | None = None
    frames: list[list[str]] | None = None


def _draw(model: LoadedModel, temperature: float = 0.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, suppressed=model.tokenizer.suppressed)


def _confidence(model: LoadedModel, passes: int) -> BlockDiffusion:
    return presets.confidence(model, draw=_draw(model), canvas=0, passes=passes, record=True)


def _entropy(model: LoadedModel, passes: int) -> BlockDiffusion:
    pace = FixedCount(measure="entropy")
    return presets.confidence(model, draw=_draw(model), canvas=0, passes=passes, pace=pace, record=True)


def _random(model: LoadedModel, passes: int) -> BlockDiffusion:
    return presets.ancestral(model, draw=_draw(model), canvas=0, passes=passes, record=True)


def _remask(model: LoadedModel, passes: int) -> BlockDiffusion:
    remask = Cap(eta=ETA)
    return presets.remasking(model, draw=_draw(model), canvas=0, passes=passes, remask=remask, record=True)


def _revise(model: LoadedModel, passes: int) -> BlockDiffusion | None:
    """Half of the passes write, the others revise; None where they don't hold a round."""
    first = passes // 2
    rounds = (passes - first) // (min(SPAN, first) + 1)
    return presets.revised(model, _confidence(model, first), rounds=rounds, span=SPAN) if first and rounds else None


# Each takes the likeliest tokens: what differs is which positions are written when, and what is taken back.
DECODINGS: dict[str, Callable[[LoadedModel, int], BlockDiffusion | None]] = {
    "confidence": _confidence,
    "entropy": _entropy,
    "random": _random,
    "remask": _remask,
    "revise": _revise,
}
SECOND_THOUGHTS = ("remask", "revise")


def kept(count: int) -> tuple[str, ...]:
    """The names of the best of so many answers, and of what most of them say; none of 0."""
    return (f"best of {count}", f"vote of {count}") if count else ()


def wanted(objective: Objective, decodings: Sequence[str], passes: Sequence[int], best_of: int) -> list[Way]:
    """The ways to ask a network that learnt by an objective."""
    tokens = [TOKENS] if objective.trains_ar else []
    if not objective.layout.denoises:
        return tokens
    return tokens + [Way(decoding, total) for decoding in (*decodings, *kept(best_of)) for total in passes]


def ask(
    model: LoadedModel, tests: Sequence[Example], ways: Sequence[Way], *, best_of: int = 0, shown: int | None = None
) -> Iterator[Asked]:
    """Asks all tests in each way, one after the other; `shown` is the index of the test whose frames are kept.

    The canvases of an answer share its passes, and so do the answers of which one is kept. A way with too few passes
    for that is left out, and a line of the log says so.
    """
    length, objective, done = model.config.data.task.max_lengths[1] + 1, model.config.objective, set()
    parts = _confidence(model, 1).canvases(length) if objective.layout.denoises else 1
    for way in ways:
        share = way.passes // (parts * (best_of if way.decoding in kept(best_of) else 1))
        if way == TOKENS:
            yield _tokens(model, tests, length)
        elif way in done:
            continue
        elif share and way.decoding in kept(best_of):
            both = _kept(model, tests, way.passes, _sampled(model, share), best_of, length)
            done |= {asked.way for asked in both}
            yield from (asked for asked in both if asked.way in ways)
        elif writer := DECODINGS[way.decoding](model, share) if share else None:
            yield _denoised(model, tests, way, writer, length, shown)
        else:
            log.info("%s: %d passes are too few for an answer", *way)


def _tokens(model: LoadedModel, tests: Sequence[Example], length: int) -> Asked:
    writer, found = presets.autoregressive(model, draw=_draw(model)), []
    for first, some in _batches(tests, BATCH):
        answer = presets.write(model, writer, [test.prompt for test in some], length=length, seed=first)
        found += _predictions(some, answer.texts, TOKENS, int(answer.generation.nfe))
    return Asked(TOKENS, found)


def _denoised(
    model, tests: Sequence[Example], way: Way, writer: BlockDiffusion, length: int, shown: int | None
) -> Asked:
    """One recorded answer to each test."""
    size = min(BATCH, max(CELLS // (writer.sampler.passes * writer.canvas * writer.canvases(length)), 1))
    found, takebacks, frames = [], TakeBacks(*[0] * 7), None
    for first, some in _batches(tests, size):
        answer = presets.write(model, writer, [test.prompt for test in some], length=length, seed=first)
        new = _predictions(some, answer.texts, way, int(answer.generation.nfe))
        history = recorded(answer.generation, answer.prompts, length, model.tokenizer.mask)
        takebacks += take_backs(history, _right(model, new, length), model.tokenizer.mask)
        if shown is not None and first <= shown < first + len(some):
            frames = _pieces(model, history[shown - first])
        found += new
    return Asked(way, found, takebacks if way.decoding in SECOND_THOUGHTS else None, frames)


def _sampled(model: LoadedModel, passes: int) -> BlockDiffusion:
    """Easiest first, but drawn: answers to one prompt differ."""
    return presets.confidence(model, draw=_draw(model, 1.0), canvas=0, passes=passes)


def _kept(model, tests: Sequence[Example], passes: int, writer: BlockDiffusion, count: int, length: int) -> list[Asked]:
    """Of `count` answers to each test the best by the network's own reading, and the one given most often."""
    causal = model.config.objective.trains_ar
    score, reads = (best_of_n.by_causal, 1) if causal else (lambda *both: best_of_n.by_bound(*both, draws=DRAWS), DRAWS)
    best, votes = (Asked(Way(name, passes), []) for name in kept(count))
    for first, some in _batches(tests, max(BATCH // count, 1)):
        prompts = [test.prompt for test in some]
        chosen = best_of_n.best_of(model, writer, prompts, count, score=score, length=length, seed=first)
        nfe, texts = count * int(chosen.answer.generation.nfe), chosen.answer.texts
        most = [best_of_n.majority_vote(texts[row * count : (row + 1) * count]).text for row in range(len(some))]
        best.predictions.extend(_predictions(some, chosen.texts, best.way, nfe + count * reads))
        votes.predictions.extend(_predictions(some, most, votes.way, nfe))
    return [best, votes]


def _batches(tests: Sequence[Example], size: int) -> Iterator[tuple[int, Sequence[Example]]]:
    """Each batch and the number of its first test, which is its seed."""
    return ((first, tests[first : first + size]) for first in range(0, len(tests), size))


def _predictions(tests: Sequence[Example], texts: Sequence[str], way: Way, nfe: int) -> list[Prediction]:
    return [Prediction(*test, text, *way, nfe) for test, text in zip(tests, texts, strict=True)]


def _right(model: LoadedModel, predictions: Sequence[Prediction], length: int) -> np.ndarray:
    """int32 [rows, length]: a right answer and its end of text, then the mask; its own, where what was written is."""
    task, tokenizer = model.config.data.task, model.tokenizer
    right = np.full((len(predictions), length), tokenizer.mask, np.int32)
    for row, one in zip(right, predictions, strict=True):
        text = one.prediction if task.verify(one.prompt, one.prediction) else one.answer
        ids = [*tokenizer.encode(text), tokenizer.eos]
        row[: len(ids)] = ids
    return right


def _pieces(model: LoadedModel, frames: np.ndarray) -> list[list[str]]:
    tokenizer = model.tokenizer
    ids = [int(i) for i in np.unique(frames) if i != tokenizer.mask]
    text = dict(zip(ids, tokenizer.pieces(ids), strict=True)) | {tokenizer.mask: "", tokenizer.eos: END_OF_TEXT}
    return [[text[int(i)] for i in frame] for frame in frames]
