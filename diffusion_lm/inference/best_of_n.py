"""Many answers to one prompt, and which to keep: by a reading of the network, a user's verifier, or a vote."""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.build import LoadedModel, objective_of
from diffusion_lm.evaluation.generation_quality import judged
from diffusion_lm.inference.pipeline import GenerationOutput, infill, write
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.types import Batch

Score = Callable[[LoadedModel, GenerationOutput], Sequence[float]]  # a number an answer, the higher the better
MOST_LENGTHS = 64  # ways to fill the holes of one text that are tried


class Chosen(NamedTuple):
    """Of each prompt's answers: the best text, its index, and the scores float64 [prompts, count]; and all answers,
    each prompt's one after the other."""

    texts: list[str]
    index: np.ndarray
    scores: np.ndarray
    answer: GenerationOutput


def best_of(
    model: LoadedModel, writer: Any, prompts: Sequence[str], count: int, *, score: Score, length: int, seed: int, **rest
) -> Chosen:
    """Of `count` answers to each prompt the one of the highest score, the first of equals.

    score  `by_causal`, `by_bound`, or a verifier: any function of the model and the answers
    rest   as in `write`
    """
    if count < 1:
        raise ValueError(f"the best of at least 1 answer, not of {count}")
    answer = write(model, writer, [p for p in prompts for _ in range(count)], length=length, seed=seed, **rest)
    scores = np.asarray(score(model, answer), np.float64).reshape(len(prompts), count)
    return _chosen(answer, scores)


def infill_best(
    model: LoadedModel, writer: BlockDiffusion, text: Sequence[str | int | range], *, score: Score, seed: int, **rest
) -> Chosen:
    """Fills in a text whose holes may have one of several numbers of tokens, given as a range: all of them are tried,
    in one batch, and the fill of the highest score is the best. Raises ValueError for more than 64 ways, or none.

    rest  as in `fill`
    """
    sizes = [part if isinstance(part, range) else [part] for part in text]
    ways = list(itertools.islice(itertools.product(*sizes), MOST_LENGTHS + 1))
    if not 1 <= len(ways) <= MOST_LENGTHS:
        raise ValueError(f"the holes' lengths must leave 1 to {MOST_LENGTHS} ways to fill the text: name fewer")
    answer = infill(model, writer, ways, seed=seed, **rest)
    return _chosen(answer, np.asarray(score(model, answer), np.float64)[None])


def _chosen(answer: GenerationOutput, scores: np.ndarray) -> Chosen:
    if not np.isfinite(scores).all():
        raise ValueError("a score must be a number for every answer")
    index = scores.argmax(axis=1)
    texts = [answer.texts[row * scores.shape[1] + best] for row, best in enumerate(index)]
    return Chosen(texts, index, scores, answer)


class Vote(NamedTuple):
    """A text of the answer that was given most often, and its share of all."""

    text: str
    share: float


def majority_vote(texts: Sequence[str], key: Callable[[str], Hashable | None] = str.strip) -> Vote:
    """The majority (arXiv 2203.11171): texts with one `key` are one answer, of equals the one given first. None is no
    answer, but counts among all. Raises ValueError where nobody gave one."""
    keys = [key(text) for text in texts]
    given = [k for k in keys if k is not None]
    if not given:
        raise ValueError("no text holds an answer: nothing to vote on")
    counts = {k: given.count(k) for k in dict.fromkeys(given)}
    winner = max(counts, key=counts.get)
    return Vote(texts[keys.index(winner)], counts[winner] / len(keys))


def by_causal(model: LoadedModel, answer: GenerationOutput) -> np.ndarray:
    """float64 [answers]: log probability a token, ends of text included, read from left to right.

    Raises ValueError for a network that wasn't trained to read so.
    """
    if not model.config.objective.trains_ar:
        raise ValueError(f"{type(model.config.objective).__name__} reads no text causally: score by_bound")
    batch = scored(model, answer)
    nats = np.asarray(_judged(model.network, batch.tokens), np.float64)
    return -(nats * batch.loss_mask).sum(axis=1) / batch.loss_mask.sum(axis=1)


def by_bound(model: LoadedModel, answer: GenerationOutput, *, draws: int = 8, seed: int = 0) -> np.ndarray:
    """float64 [answers]: minus the denoiser's own bound, nats a token, in the mean over `draws` of noise, which are
    the same for every answer. Raises ValueError for a network that denoises nothing."""
    if not model.config.objective.layout.denoises or draws < 1:
        raise ValueError("a bound needs a network that denoises, and 1 draw of noise or more: score by_causal")
    batch, keys = scored(model, answer), jax.random.split(jax.random.key(seed), draws)
    objective = objective_of(model.config, bound=True)
    return -np.asarray(_bounds(model.network, keys, batch, objective, model.process), np.float64)


_judged = jax.jit(lambda bound, rows: judged(bound.denoise, rows))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _bounds(bound, keys, batch: Batch, objective, process) -> jax.Array:
    """Nats a token of each row, float32 [rows]: the parts of the objective that denoise."""

    def row(key, one: Batch):
        parts = objective(bound.denoise, process, key, jax.tree.map(lambda a: a[None], one))
        return sum(part.mean for name, part in parts.items() if name != "causal")

    return jnp.mean(jax.lax.map(lambda key: jax.vmap(lambda one: row(key, one))(batch), keys), axis=0)


def scored(model: LoadedModel, answer: GenerationOutput) -> Batch:
    """Answers as training rows: the prompt given, the answer and the end of text it came to as targets, that end
    repeated up to the end of its canvas."""
    length, tokenizer = model.config.data.seq_len, model.tokenizer
    layout, shape = model.config.objective.layout, (len(answer.texts), length)
    tokens, segment_ids = np.full(shape, tokenizer.mask, np.int32), np.zeros(shape, np.int32)
    given, target = np.zeros(shape, bool), np.zeros(shape, bool)
    counts, most = np.asarray(answer.generation.length), np.broadcast_to(answer.asked, shape[0])
    answers = zip(answer.prompts, answer.generation.tokens, counts, most, strict=True)
    for row, (prompt, written, count, asked) in enumerate(answers):
        start, stop = len(prompt), len(prompt) + int(count)
        tokens[row, :start], tokens[row, start:stop] = prompt, np.asarray(written)[:count]
        if count < asked and stop < length:  # it came to an end
            end = layout.canvas_end(stop + 1, length)
            tokens[row, stop:end] = tokenizer.eos
            segment_ids[row, :end], stop = 1, stop + 1
        segment_ids[row, :stop], given[row, :start], target[row, start:stop] = 1, True, True
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(tokens=tokens, segment_ids=segment_ids, positions=positions, context_mask=given, loss_mask=target)
