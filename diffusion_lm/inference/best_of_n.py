"""Several answers to one prompt, and which to keep: by the network's likelihood, a user's verifier, or a majority
vote."""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.evaluation.generation_quality import judged
from diffusion_lm.inference.pipeline import GenerationOutput, generate, infill
from diffusion_lm.loaded_model import LoadedModel, objective_of
from diffusion_lm.samplers.base import TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.types import Batch

Score = Callable[[LoadedModel, GenerationOutput], Sequence[float]]  # a number an answer, the higher the better
MAX_LENGTHS = 64  # combinations of hole lengths of one text


class Chosen(NamedTuple):
    """Of each prompt's answers: the best text, its index, and the scores float64 [prompts, count]; and all answers,
    each prompt's one after the other."""

    texts: list[str]
    index: np.ndarray
    scores: np.ndarray
    output: GenerationOutput


def best_of(
    model: LoadedModel, sampler: TextSampler, prompts: Sequence[str], count: int, *, score: Score, **options
) -> Chosen:
    """The answer with the highest score of `count` answers to each prompt, the first of equals.

    score    `log_likelihood`, `elbo`, or a verifier: any function of the model and the answers
    options  as in `generate`
    """
    if count < 1:
        raise ValueError(f"best_of needs at least 1 answer; got {count}")
    output = generate(model, sampler, [p for p in prompts for _ in range(count)], **options)
    return _chosen(output, np.asarray(score(model, output), np.float64).reshape(len(prompts), count))


def infill_best(
    model: LoadedModel, sampler: BlockDiffusion, text: Sequence[str | int | range], *, score: Score, **options
) -> Chosen:
    """Infills a text whose holes may have one of several numbers of tokens, given as a range: all combinations are
    generated in one batch, and the one with the highest score is the best. Raises ValueError for more than 64, or none.

    options  as in `infill`
    """
    sizes = [part if isinstance(part, range) else [part] for part in text]
    ways = list(itertools.islice(itertools.product(*sizes), MAX_LENGTHS + 1))
    if not 1 <= len(ways) <= MAX_LENGTHS:
        raise ValueError(f"the holes' lengths must leave 1 to {MAX_LENGTHS} combinations: give fewer")
    output = infill(model, sampler, ways, **options)
    return _chosen(output, np.asarray(score(model, output), np.float64)[None])


def _chosen(output: GenerationOutput, scores: np.ndarray) -> Chosen:
    if not np.isfinite(scores).all():
        raise ValueError("a score must be a number for every answer")
    index = scores.argmax(axis=1)
    texts = [output.texts[row * scores.shape[1] + best] for row, best in enumerate(index)]
    return Chosen(texts, index, scores, output)


class Vote(NamedTuple):
    """A text of the most frequent answer, and its share of all."""

    text: str
    share: float


def majority_vote(texts: Sequence[str], key: Callable[[str], Hashable | None] = str.strip) -> Vote:
    """The most frequent answer (self-consistency, arXiv 2203.11171): texts with one `key` are one answer, of equals the
    first. A key of None is no answer, but counts among all. Raises ValueError where there is no answer."""
    keys = [key(text) for text in texts]
    answers = [k for k in keys if k is not None]
    if not answers:
        raise ValueError("no text holds an answer: nothing to vote on")
    counts = {k: answers.count(k) for k in dict.fromkeys(answers)}
    winner = max(counts, key=counts.get)
    return Vote(texts[keys.index(winner)], counts[winner] / len(keys))


def log_likelihood(model: LoadedModel, output: GenerationOutput) -> np.ndarray:
    """float64 [answers]: autoregressive log probability a token, ends of text included.

    Raises ValueError for a network that wasn't trained autoregressively.
    """
    if not model.config.objective.trains_ar:
        raise ValueError(f"{type(model.config.objective).__name__} isn't autoregressive: score by the ELBO")
    batch = answers_batch(model, output)
    nats = np.asarray(_judged(model.network, batch.tokens), np.float64)
    return -(nats * batch.loss_mask).sum(axis=1) / batch.loss_mask.sum(axis=1)


def elbo(model: LoadedModel, output: GenerationOutput, *, draws: int = 8, seed: int = 0) -> np.ndarray:
    """float64 [answers]: the denoiser's ELBO, nats a token, in the mean over `draws` of noise, which are the same for
    every answer. Raises ValueError for a network that denoises nothing."""
    if not model.config.objective.layout.denoises or draws < 1:
        raise ValueError("an ELBO needs a network that denoises, and 1 draw of noise or more: score by log likelihood")
    batch, keys = answers_batch(model, output), jax.random.split(jax.random.key(seed), draws)
    objective = objective_of(model.config)
    return -np.asarray(_nelbos(model.network, keys, batch, objective, model.process), np.float64)


_judged = jax.jit(lambda network, rows: judged(network.denoise, rows))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _nelbos(network, keys, batch: Batch, objective, process) -> jax.Array:
    """Nats a token of each row, float32 [rows]: the parts of the objective that denoise."""

    def row(key, one: Batch):
        parts = objective.elbo(network.denoise, process, key, jax.tree.map(lambda a: a[None], one))
        return sum(part.mean for name, part in parts.items() if name != "causal")

    return jnp.mean(jax.lax.map(lambda key: jax.vmap(lambda one: row(key, one))(batch), keys), axis=0)


def answers_batch(model: LoadedModel, output: GenerationOutput) -> Batch:
    """Answers as training rows: the prompt is context; the answer and its end of text are scored, that end repeated up
    to the end of its canvas."""
    length, tokenizer = model.config.data.seq_len, model.tokenizer
    layout, shape = model.config.objective.layout, (len(output.texts), length)
    tokens, segment_ids = np.full(shape, tokenizer.mask, np.int32), np.zeros(shape, np.int32)
    context_mask, loss_mask = np.zeros(shape, bool), np.zeros(shape, bool)
    counts, most = np.asarray(output.generation.length), np.broadcast_to(output.max_new_tokens, shape[0])
    answers = zip(output.prompt_ids, output.generation.tokens, counts, most, strict=True)
    for row, (prompt, new, count, max_new_tokens) in enumerate(answers):
        start, stop = len(prompt), len(prompt) + int(count)
        tokens[row, :start], tokens[row, start:stop] = prompt, np.asarray(new)[:count]
        if count < max_new_tokens and stop < length:  # the text ended
            end = layout.canvas_end(stop + 1, length)
            tokens[row, stop:end] = tokenizer.eos
            segment_ids[row, :end], stop = 1, stop + 1
        segment_ids[row, :stop], context_mask[row, :start], loss_mask[row, start:stop] = 1, True, True
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(
        tokens=tokens, segment_ids=segment_ids, positions=positions, context_mask=context_mask, loss_mask=loss_mask
    )
