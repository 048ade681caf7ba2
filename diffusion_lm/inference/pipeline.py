"""Prompts in, texts out: what is between a trained network and a writer, and what comes back."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.build import LoadedModel
from diffusion_lm.data.tokenizer import decode_continuation, encode_prompt
from diffusion_lm.inference.runner import drive
from diffusion_lm.samplers.base import Generation, Prompt, TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.guidance import ClassifierFreeGuidance
from diffusion_lm.samplers.logits_processors import LogitsProcessor, ProcessedDenoiser
from diffusion_lm.visualize.frames import Trace, trace_from_history

log = logging.getLogger(__name__)
_SLID = 2**31 - 1  # no writer draws with the keys from here on down: each slide's are one less


class GenerationOutput(NamedTuple):
    """texts, one a prompt; the generation they came from; the prompts' ids, begin of text included; how many tokens
    were asked for, of all or of each."""

    texts: list[str]
    generation: Generation
    prompts: list[np.ndarray]
    asked: int | np.ndarray


def write(
    model: LoadedModel,
    writer: TextSampler,
    prompts: Sequence[str],
    *,
    length: int,
    seed: int,
    constraint: LogitsProcessor | None = None,
    guidance: float = 0.0,
    compact: bool = False,
    slide: bool = False,
) -> GenerationOutput:
    """Writes at most `length` tokens behind each prompt. Row i draws from key i of `seed`, whatever the batch.

    constraint  a rule that what is written keeps to (see `samplers.constraint`)
    guidance    how much more than the network says the prompt counts (see `samplers.guidance`); 0: as it says
    compact     rows that finish leave the batch (see `samplers.driver`)
    slide       where the context is full, go on behind the latter half of it. The generation then has neither cache
                nor history, and rows with prompts of different lengths are written one group after the other

    Raises ValueError for what the model's context can't hold, and for a mixture that can't be.
    """
    ids, context = encoded(model, prompts), model.config.data.seq_len
    room = context - max(len(row) for row in ids)
    if length < 1 or (length > room and not slide):
        raise ValueError(
            f"length must be 1 to {room} (context {context} less the prompt), not {length}; or slide: forget the oldest"
        )
    ask = _Request(model=model, writer=writer, constraint=constraint, guidance=guidance, compact=compact)
    if length <= room:
        generation = ask(ids, row_keys(seed, len(ids)), length=length)
    else:
        generation = rolling_generate(ask, ids, row_keys(seed, len(ids)), length=length)
    return _answer(model, generation, ids, length)


def infill(
    model: LoadedModel,
    writer: BlockDiffusion,
    texts: Sequence[Sequence[str | int]],
    *,
    seed: int,
    constraint: LogitsProcessor | None = None,
) -> GenerationOutput:
    """Fills in what is missing: each text is a list of strings, and of numbers of tokens that are to be written there.

    A canvas sees what is given inside it and before it, so that a text of one canvas is filled in knowing all of it.
    Texts of all lengths go together, in one program: a row draws what it would draw alone. The answer's texts are what
    stands behind the first string (the prompt), holes filled. Raises ValueError for a text that has no hole, or doesn't
    fit the context (or the canvas that must hold all of it), and for a writer that can't look ahead.
    """
    if not isinstance(writer, BlockDiffusion):
        raise ValueError(f"{type(writer).__name__} can't look ahead: fill in with canvases (confidence, ancestral)")
    laid, context = [_laid(model, text) for text in texts], model.config.data.seq_len
    room = context if writer.align else min(writer.canvas, context)
    if max(len(prompt) + len(behind) for prompt, behind in laid) > room:
        holder = "model's context" if room == context else "canvas"
        raise ValueError(f"a text with its holes takes more than the {holder} of {room}: shorten it")
    ask, keys = _Request(model=model, writer=writer, constraint=constraint), row_keys(seed, len(laid))
    prompts, behind = zip(*laid, strict=True)
    wanted = np.array([len(row) for row in behind], np.int32)
    widest = int(wanted.max())
    length = widest if writer.align != 1 else -(-widest // writer.canvas) * writer.canvas  # each canvas is whole
    behind = [np.pad(row, (0, length - len(row)), constant_values=model.tokenizer.mask) for row in behind]
    written = ask(list(prompts), keys, length=length, behind=np.stack(behind), wanted=wanted)
    generation = written.replace(tokens=written.tokens[:, :widest], cache=None, history=None)
    return _answer(model, generation, list(prompts), wanted)


class _Sheet:
    """The texts of many rows, written down part by part."""

    def __init__(self, rows: int, length: int, mask: int):
        self.tokens, self.count, self.nfe = np.full((rows, length), mask, np.int32), np.zeros(rows, np.int32), 0

    def add(self, rows: np.ndarray, generation: Generation) -> None:
        """What was written behind what the rows have."""
        for row, new in zip(rows, np.asarray(generation.tokens), strict=True):
            self.tokens[row, self.count[row] : self.count[row] + len(new)] = new
        self.count[rows] += np.asarray(generation.length)
        self.nfe += int(generation.nfe)

    def generation(self) -> Generation:
        tokens, count, nfe = (jnp.asarray(a, jnp.int32) for a in (self.tokens, self.count, self.nfe))
        return Generation(tokens=tokens, length=count, nfe=nfe, cache=None)


def _laid(model: LoadedModel, text: Sequence[str | int]) -> tuple[np.ndarray, np.ndarray]:
    """Begin of text and the first string's tokens; what stands behind, holes masked."""
    first, *rest = text if text and isinstance(text[0], str) else ["", *text]
    if not any(isinstance(part, int) for part in rest) or any(isinstance(p, int) and p < 1 for p in rest):
        raise ValueError("a text to fill in needs a hole of 1 token or more")
    tokenizer = model.tokenizer
    parts = [np.full(p, tokenizer.mask) if isinstance(p, int) else encode_prompt(tokenizer, p) for p in rest]
    return encoded(model, [first])[0], np.concatenate(parts).astype(np.int32)


def encoded(model: LoadedModel, prompts: Sequence[str]) -> list[np.ndarray]:
    """Begin of text and each prompt's tokens. Raises ValueError where that fills the model's context."""
    tokenizer, context = model.tokenizer, model.config.data.seq_len
    ids = [np.concatenate([[tokenizer.bos], encode_prompt(tokenizer, text)]).astype(np.int32) for text in prompts]
    widest = max(len(row) for row in ids)
    if widest >= context:
        raise ValueError(f"the prompt has {widest} tokens, the model's context {context}: shorten the prompt")
    return ids


def row_keys(seed: int, rows: int) -> jax.Array:
    """A key a row: row i draws the same in every batch."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """A model and all that is between it and a writer: a call writes behind token rows that fit the context."""

    model: LoadedModel
    writer: TextSampler
    constraint: LogitsProcessor | None = None
    guidance: float = 0.0
    compact: bool = False

    def __call__(
        self,
        ids: list[np.ndarray],
        keys: jax.Array,
        *,
        length: int,
        behind: np.ndarray | None = None,
        wanted: np.ndarray | None = None,
    ) -> Generation:
        widest = max(len(row) for row in ids)
        prompt = Prompt(
            tokens=jnp.asarray([np.pad(row, (0, widest - len(row))) for row in ids]),
            length=jnp.asarray([len(row) for row in ids], jnp.int32),
            behind=None if behind is None else jnp.asarray(behind),
            wanted=None if wanted is None else jnp.asarray(wanted),
        )
        network = self._network(prompt, len(ids) * self.writer.width(length))
        written = drive(self.writer, network, prompt, keys, length=length, compact=self.compact)
        return jax.block_until_ready(written)

    def _network(self, prompt: Prompt, rows: int):
        """What the writer is to take for the network."""
        mask, prefix = self.model.tokenizer.mask, self.model.config.objective.layout.prefix
        network = self.model.for_sampling(rows * (2 if self.guidance else 1))
        if self.guidance:
            if isinstance(prefix, BlockCausal) or not np.isfinite(self.guidance):
                raise ValueError(f"guidance={self.guidance} needs a number, and text that isn't read in blocks")
            scale = jnp.asarray(self.guidance, jnp.float32)
            network = ClassifierFreeGuidance(model=network, scale=scale, prompt=prompt.length, mask=mask)
        return network if self.constraint is None else ProcessedDenoiser(network, self.constraint, mask)


def rolling_generate(ask: _Request, ids: list[np.ndarray], keys: jax.Array, *, length: int) -> Generation:
    """As much text as is asked for: where the context is full, the latter half of it is the next prompt.

    Rows go together where their prompts are of one length, so that a row slides where it would alone.
    """
    if ask.guidance or getattr(ask.writer, "record", False):
        raise ValueError("guidance and recordings end with the context: don't slide, or leave them out")
    half, sheet = ask.model.config.data.seq_len // 2, _Sheet(len(ids), length, ask.model.tokenizer.mask)
    for width in sorted({len(row) for row in ids}):
        rows, piece = np.flatnonzero([len(row) == width for row in ids]), 0
        text = np.stack([ids[row] for row in rows])
        while len(rows) and sheet.count[rows[0]] < length:
            size = _piece(ask, text.shape[1], length - int(sheet.count[rows[0]]))
            written = ask(list(text), _keys_of_piece(keys[rows], piece), length=size)
            sheet.add(rows, written)
            going, piece = np.asarray(written.length) == size, piece + 1
            rows, text = rows[going], np.concatenate([text, written.tokens], axis=1)[going, -half:]
            log.info("%d of %d rows go on behind %d tokens", len(rows), len(ids), sheet.count.max())
    return sheet.generation()


def _keys_of_piece(keys: jax.Array, piece: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, _SLID - piece))(keys) if piece else keys


def _piece(ask: _Request, width: int, left: int) -> int:
    """How much to write before the context is full: whole canvases, unless the rest is less."""
    room = ask.model.config.data.seq_len - width
    if left <= room:
        return left
    canvas = getattr(ask.writer, "canvas", 1)
    return room // canvas * canvas or room


def _answer(
    model: LoadedModel, generation: Generation, ids: list[np.ndarray], asked: int | np.ndarray
) -> GenerationOutput:
    tokens, count = np.asarray(generation.tokens), np.asarray(generation.length)
    rows = zip(ids, tokens, count, strict=True)
    texts = [decode_continuation(model.tokenizer, prompt, row[:n]) for prompt, row, n in rows]
    return GenerationOutput(texts, generation, ids, asked)


def trace(
    model: LoadedModel, answer: GenerationOutput, row: int, *, length: int, title: str, subtitle: str = ""
) -> Trace:
    """One row's generation, pass by pass, for `visualize`. Raises ValueError if it wasn't recorded."""
    history, prompt, mask = answer.generation.history, answer.prompts[row], model.tokenizer.mask
    if history is None:
        raise ValueError("only canvases that were recorded can be shown: use --sampler=confidence or ancestral")
    made, start = np.asarray(history.made), np.asarray(history.start)[:, row]
    canvas = np.repeat(np.arange(len(made)), made)
    width = history.tokens.shape[-1]
    text = np.full(max(int(start[made > 0].max()) + width, len(prompt) + length), mask, np.int32)
    text[: len(prompt)] = prompt
    probability = np.full(len(text), np.nan, np.float32)
    tokens, probabilities = [], []
    for c in range(len(made)):
        for p in range(made[c]):
            here = slice(int(start[c]), int(start[c]) + width)
            text[here], probability[here] = history.tokens[c, p, row], history.confidence[c, p, row]
            tokens.append(text.copy())
            probabilities.append(probability.copy())
    return trace_from_history(
        np.stack(tokens),
        np.stack(probabilities),
        prompt_length=len(prompt),
        length=len(prompt) + length,
        mask=mask,
        eos=model.tokenizer.eos,
        texts=model.tokenizer.pieces,
        title=title,
        subtitle=subtitle,
        canvas=canvas,
    )
