"""The decodings that the scoreboard compares, and what it keeps of each: answers, take-backs, the passes of one."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_lm import generate, many
from diffusion_lm.build import Model
from diffusion_lm.evaluation.accuracy import TOKENS, Prediction, Way
from diffusion_lm.evaluation.takebacks import TakeBacks, recorded, take_backs
from diffusion_lm.samplers.canvases import Canvases
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.samplers.pace import Even
from diffusion_lm.samplers.remasking import Cap
from diffusion_lm.tasks.base import Example
from diffusion_lm.types import Objective
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


def _draw(model: Model, temperature: float = 0.0) -> Draw:
    return Draw(temperature=temperature, suppressed=model.tokenizer.suppressed)


def _confidence(model: Model, passes: int) -> Canvases:
    return generate.confidence(model, draw=_draw(model), canvas=0, passes=passes, record=True)


def _entropy(model: Model, passes: int) -> Canvases:
    pace = Even(measure="entropy")
    return generate.confidence(model, draw=_draw(model), canvas=0, passes=passes, pace=pace, record=True)


def _random(model: Model, passes: int) -> Canvases:
    return generate.ancestral(model, draw=_draw(model), canvas=0, passes=passes, record=True)


def _remask(model: Model, passes: int) -> Canvases:
    remask = Cap(eta=ETA)
    return generate.remasking(model, draw=_draw(model), canvas=0, passes=passes, remask=remask, record=True)


def _revise(model: Model, passes: int) -> Canvases | None:
    """Half of the passes write, the others revise; None where they don't hold a round."""
    first = passes // 2
    rounds = (passes - first) // (min(SPAN, first) + 1)
    return generate.revised(model, _confidence(model, first), rounds=rounds, span=SPAN) if first and rounds else None


# Each takes the likeliest tokens: what differs is which positions are written when, and what is taken back.
DECODINGS: dict[str, Callable[[Model, int], Canvases | None]] = {
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
    tokens = [TOKENS] if objective.causal else []
    if objective.canvas == 1:
        return tokens
    return tokens + [Way(decoding, total) for decoding in (*decodings, *kept(best_of)) for total in passes]


def ask(
    model: Model, tests: Sequence[Example], ways: Sequence[Way], *, best_of: int = 0, shown: int | None = None
) -> Iterator[Asked]:
    """Asks all tests in each way, one after the other; `shown` is the index of the test whose frames are kept.

    The canvases of an answer share its passes, and so do the answers of which one is kept. A way with too few passes
    for that is left out, and a line of the log says so.
    """
    length, objective, done = model.config.data.task.longest[1] + 1, model.config.objective, set()
    parts = _confidence(model, 1).canvases(length) if objective.canvas > 1 else 1
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


def _tokens(model: Model, tests: Sequence[Example], length: int) -> Asked:
    writer, found = generate.autoregressive(model, draw=_draw(model)), []
    for first, some in _batches(tests, BATCH):
        answer = generate.write(model, writer, [test.prompt for test in some], length=length, seed=first)
        found += _predictions(some, answer.texts, TOKENS, int(answer.generation.nfe))
    return Asked(TOKENS, found)


def _denoised(model, tests: Sequence[Example], way: Way, writer: Canvases, length: int, shown: int | None) -> Asked:
    """One recorded answer to each test."""
    size = min(BATCH, max(CELLS // (writer.sampler.passes * writer.canvas * writer.canvases(length)), 1))
    found, takebacks, frames = [], TakeBacks(*[0] * 7), None
    for first, some in _batches(tests, size):
        answer = generate.write(model, writer, [test.prompt for test in some], length=length, seed=first)
        new = _predictions(some, answer.texts, way, int(answer.generation.nfe))
        history = recorded(answer.generation, answer.prompts, length, model.tokenizer.mask)
        takebacks += take_backs(history, _right(model, new, length), model.tokenizer.mask)
        if shown is not None and first <= shown < first + len(some):
            frames = _pieces(model, history[shown - first])
        found += new
    return Asked(way, found, takebacks if way.decoding in SECOND_THOUGHTS else None, frames)


def _sampled(model: Model, passes: int) -> Canvases:
    """Easiest first, but drawn: answers to one prompt differ."""
    return generate.confidence(model, draw=_draw(model, 1.0), canvas=0, passes=passes)


def _kept(model, tests: Sequence[Example], passes: int, writer: Canvases, count: int, length: int) -> list[Asked]:
    """Of `count` answers to each test the best by the network's own reading, and the one given most often."""
    causal = model.config.objective.causal
    score, reads = (many.by_causal, 1) if causal else (lambda *both: many.by_bound(*both, draws=DRAWS), DRAWS)
    best, votes = (Asked(Way(name, passes), []) for name in kept(count))
    for first, some in _batches(tests, max(BATCH // count, 1)):
        prompts = [test.prompt for test in some]
        chosen = many.best_of(model, writer, prompts, count, score=score, length=length, seed=first)
        nfe, texts = count * int(chosen.answer.generation.nfe), chosen.answer.texts
        most = [many.vote(texts[row * count : (row + 1) * count]).text for row in range(len(some))]
        best.predictions.extend(_predictions(some, chosen.texts, best.way, nfe + count * reads))
        votes.predictions.extend(_predictions(some, most, votes.way, nfe))
    return [best, votes]


def _batches(tests: Sequence[Example], size: int) -> Iterator[tuple[int, Sequence[Example]]]:
    """Each batch and the number of its first test, which is its seed."""
    return ((first, tests[first : first + size]) for first in range(0, len(tests), size))


def _predictions(tests: Sequence[Example], texts: Sequence[str], way: Way, nfe: int) -> list[Prediction]:
    return [Prediction(*test, text, *way, nfe) for test, text in zip(tests, texts, strict=True)]


def _right(model: Model, predictions: Sequence[Prediction], length: int) -> np.ndarray:
    """int32 [rows, length]: a right answer and its end of text, then the mask; its own, where what was written is."""
    task, tokenizer = model.config.data.task, model.tokenizer
    right = np.full((len(predictions), length), tokenizer.mask, np.int32)
    for row, one in zip(right, predictions, strict=True):
        text = one.prediction if task.verify(one.prompt, one.prediction) else one.answer
        ids = [*tokenizer.encode(text), tokenizer.eot]
        row[: len(ids)] = ids
    return right


def _pieces(model: Model, frames: np.ndarray) -> list[list[str]]:
    tokenizer = model.tokenizer
    ids = [int(i) for i in np.unique(frames) if i != tokenizer.mask]
    text = dict(zip(ids, tokenizer.pieces(ids), strict=True)) | {tokenizer.mask: "", tokenizer.eot: END_OF_TEXT}
    return [[text[int(i)] for i in frame] for frame in frames]
