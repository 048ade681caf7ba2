"""Prompts in, texts out: what lies between a trained network with its text sampler and strings."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.build import LoadedModel
from diffusion_lm.data.tokenizer import decode_continuation, encode_prompt, with_bos
from diffusion_lm.inference import runner
from diffusion_lm.samplers.base import Generation, Prompt, TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.logits_processors import Chain, LogitsProcessor
from diffusion_lm.samplers.processed_denoiser import ProcessedDenoiser
from diffusion_lm.visualize.frames import Trace, trace_from_history

log = logging.getLogger(__name__)
_MIN_WIDTH = 16
_ROLLING = 2**31 - 1  # no sampler draws with the keys from here on down: each continuation's are one less


class GenerationOutput(NamedTuple):
    """texts, one a prompt; the generation that they are decoded from; prompt_ids, begin of text included;
    max_new_tokens, of all rows or int32 [B] of each."""

    texts: list[str]
    generation: Generation
    prompt_ids: list[np.ndarray]
    max_new_tokens: int | np.ndarray


def generate(
    model: LoadedModel,
    sampler: TextSampler,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int | Sequence[int],
    logits_processor: LogitsProcessor | None = None,
    cfg_scale: float = 0.0,
    drop_finished: bool = False,
    rolling_context: bool = False,
    first_row: int = 0,
) -> GenerationOutput:
    """Generates text after each prompt. Row i draws from key i of `seed`, whatever the batch.

    Args:
      model: a trained network.
      sampler: a text sampler (see `presets`).
      prompts: one a row; "" is a new document.
      max_new_tokens: tokens a row, at most.
      seed: of all draws; or one a row.
      logits_processor: a rule on logits (see `samplers.logits_processors`).
      cfg_scale: classifier-free guidance scale s, (1 + s) conditional - s unconditional; 0: off.
      drop_finished: rows that finish leave the batch (see `runner`).
      rolling_context: where the context is full, continue after its latter half. The generation then has neither cache
        nor history, and rows with prompts of different lengths are generated one group after the other.
      first_row: the number of the first row, where these prompts are a part of many.

    Raises:
      ValueError: for what the model's context can't hold, and for options that don't go together.
    """
    ids = encode_prompts(model, prompts)
    room = checked_room(model, ids, max_new_tokens, rolling_context)
    request = Request(
        model=model, sampler=sampler, logits_processor=logits_processor, cfg_scale=cfg_scale,
        drop_finished=drop_finished,
    )  # fmt: skip
    run = request if max_new_tokens <= room else functools.partial(rolling_generate, request)
    keys = row_keys(seed, len(ids), first_row)
    return _output(model, run(ids, keys, max_new_tokens=max_new_tokens), ids, max_new_tokens)


def infill(
    model: LoadedModel,
    sampler: BlockDiffusion,
    texts: Sequence[Sequence[str | int]],
    *,
    seed: int,
    logits_processor: LogitsProcessor | None = None,
) -> GenerationOutput:
    """Fills holes in texts: each text is a list of strings (or their ids), and of numbers of tokens to be generated
    there.

    A canvas attends to the fixed tokens inside and before it, so that a text of one canvas is infilled given all of it.
    Texts of all lengths go together, in one program; a row is what it would be alone. The output's texts are what
    follows the first string (the prompt), holes filled.

    Raises:
      ValueError: for a text without a hole, one that doesn't fit the context (or the canvas that must hold all of it),
      and
        a sampler that can't condition on later text.
    """
    ids, lengths, suffix = encode_infill(model, sampler, texts)
    generation = Request(model=model, sampler=sampler, logits_processor=logits_processor)(
        ids, row_keys(seed, len(ids)), max_new_tokens=suffix.shape[1], suffix=suffix, num_new_tokens=lengths
    )
    generation = generation.replace(tokens=generation.tokens[:, : lengths.max()], cache=None, history=None)
    return _output(model, generation, ids, lengths)


def encode_infill(
    model: LoadedModel, sampler: TextSampler, texts: Sequence[Sequence[str | int]]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Texts with holes: the first strings' tokens; how many tokens follow each, int32 [B]; and these, int32 [B, N],
    the mask id in holes and behind the end. Raises ValueError as `infill` does."""
    if not isinstance(sampler, BlockDiffusion):
        raise ValueError(f"{type(sampler).__name__} can't infill: use canvases (confidence, ancestral)")
    parts, context = [_prompt_and_suffix(model, text) for text in texts], model.config.data.seq_len
    room = context if sampler.align else min(sampler.canvas_length, context)
    if max(len(prompt) + len(suffix) for prompt, suffix in parts) > room:
        holder = "model's context" if room == context else "canvas"
        raise ValueError(f"a text with its holes takes more than the {holder} of {room} tokens: shorten it")
    prompts, suffixes = zip(*parts, strict=True)
    lengths = np.array([len(row) for row in suffixes], np.int32)
    widest, unit = int(lengths.max()), sampler.canvas_length if sampler.align == 1 else 1  # each canvas is whole
    length = unit * few_widths(-(-widest // unit), context // unit)
    suffixes = [np.pad(row, (0, length - len(row)), constant_values=model.tokenizer.mask) for row in suffixes]
    return list(prompts), lengths, np.stack(suffixes)


def _prompt_and_suffix(model: LoadedModel, text: Sequence[str | int]) -> tuple[np.ndarray, np.ndarray]:
    """Begin of text and the first string's tokens; the rest, holes masked."""
    first, *rest = ["", *text] if not text or isinstance(text[0], int) else text
    if not any(isinstance(part, int) for part in rest) or any(isinstance(p, int) and p < 1 for p in rest):
        raise ValueError("a text to infill needs a hole of 1 token or more")
    tokenizer = model.tokenizer
    parts = [
        np.full(p, tokenizer.mask)
        if isinstance(p, int)
        else encode_prompt(tokenizer, p, follows=True)
        if isinstance(p, str)
        else p
        for p in rest
    ]
    return encode_prompts(model, [first])[0], np.concatenate(parts).astype(np.int32)


def encode_prompts(model: LoadedModel, prompts: Sequence[str]) -> list[np.ndarray]:
    """Each prompt's tokens, after a begin of text where the tokenizer's texts have one.

    A prompt of ids, as `encode_chat` gives them, stays as it is. Raises ValueError where they fill the model's context.
    """
    tokenizer, context = model.tokenizer, model.config.data.seq_len
    ids = [
        with_bos(tokenizer, encode_prompt(tokenizer, p)) if isinstance(p, str) else np.asarray(p, np.int32)
        for p in prompts
    ]
    widest = max(len(row) for row in ids)
    if widest >= context:
        raise ValueError(f"the prompt has {widest} tokens, the model's context {context}: shorten the prompt")
    return ids


def checked_room(
    model: LoadedModel, ids: Sequence[np.ndarray], max_new_tokens: int, rolling_context: bool = False
) -> int:
    """How many tokens the context holds after every prompt. Raises ValueError if so many new ones don't fit."""
    context = model.config.data.seq_len
    room = context - max(len(row) for row in ids)
    if max_new_tokens < 1 or (max_new_tokens > room and not rolling_context):
        raise ValueError(
            f"max_new_tokens must be 1 to {room} (context {context} less the prompt); got {max_new_tokens}; "
            "or set rolling_context to forget the oldest tokens"
        )
    return room


def few_widths(length: int, most: int) -> int:
    """A width that holds `length`: a power of two from 16 on, but at most `most` where that is enough. Each width is a
    program of its own to compile, so that inputs of all lengths are padded to a few."""
    return max(length, min(max(_MIN_WIDTH, 1 << (length - 1).bit_length()), most))


def row_keys(seed: int | Sequence[int], rows: int, first: int = 0) -> jax.Array:
    """A key for each of the rows first, first + 1, ...: row i draws the same in every batch. With a seed a row, each
    draws as row 0 of its seed."""
    if not isinstance(seed, int):
        return jax.vmap(lambda own: jax.random.fold_in(jax.random.key(own), 0))(jnp.asarray(seed, jnp.uint32))
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(first + jnp.arange(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A model, a sampler and their options: a call generates after token rows that fit the context. Requests that are
    equal can share a batch."""

    model: LoadedModel
    sampler: TextSampler
    logits_processor: LogitsProcessor | None = None
    cfg_scale: float = 0.0
    drop_finished: bool = False

    def __call__(
        self,
        ids: list[np.ndarray],
        keys: jax.Array,
        *,
        max_new_tokens: int,
        suffix: np.ndarray | None = None,
        num_new_tokens: np.ndarray | None = None,
    ) -> Generation:
        sampler, network, prompt = self.prepared(ids, max_new_tokens, suffix, num_new_tokens)
        generation = runner.run(
            sampler, network, prompt, keys, max_new_tokens=max_new_tokens, drop_finished=self.drop_finished
        )
        return jax.block_until_ready(generation)

    def prepared(
        self,
        ids: list[np.ndarray],
        max_new_tokens: int,
        suffix: np.ndarray | None = None,
        num_new_tokens: np.ndarray | None = None,
        rows: int | None = None,
    ) -> tuple[TextSampler, Any, Prompt]:
        """The sampler for these prompts, the network and the prompts as `runner` takes them.

        rows: how many the network's type of products is chosen for (see `BoundModel.for_sampling`); None: as there are
        """
        widest, align = max(len(row) for row in ids), getattr(self.sampler, "align", 1)
        room = self.model.config.data.seq_len if align else self.sampler.canvas_length
        room -= max_new_tokens if num_new_tokens is None else 0
        # prompts narrower than `align` lie in the first canvas and cost no pass of their own
        width = few_widths(widest, align - 1 if widest < align else room)
        prompt = Prompt(
            tokens=jnp.asarray([np.pad(row, (0, width - len(row))) for row in ids]),
            length=jnp.asarray([len(row) for row in ids], jnp.int32),
            suffix=None if suffix is None else jnp.asarray(suffix),
            num_new_tokens=None if num_new_tokens is None else jnp.asarray(num_new_tokens),
        )
        sampler = self.sampler
        if hasattr(sampler, "sized"):
            sampler = sampler.sized(width, max_new_tokens)
        width = sampler.width(max_new_tokens) * (2 if self.cfg_scale else 1)
        network, prefix = self.model.for_sampling((rows or len(ids)) * width), self.model.config.objective.layout.prefix
        if not 0 <= self.cfg_scale < np.inf:
            raise ValueError(f"cfg_scale must be 0 (off) or a positive number; got {self.cfg_scale}")
        if self.cfg_scale and isinstance(prefix, BlockCausal):
            raise ValueError(f"cfg_scale={self.cfg_scale} needs text that isn't read in blocks: leave it out")
        rules = tuple(r for r in (getattr(sampler, "logits_processor", None), self.logits_processor) if r is not None)
        if self.cfg_scale or rules:
            network = ProcessedDenoiser(
                network=network,
                mask=self.model.tokenizer.mask,
                processor=Chain(rules) if rules else None,
                cfg_scale=jnp.asarray(self.cfg_scale, jnp.float32) if self.cfg_scale else None,
                prompt_length=prompt.length if self.cfg_scale else None,
            )
        return sampler, network, prompt


def rolling_generate(request: Request, ids: list[np.ndarray], keys: jax.Array, *, max_new_tokens: int) -> Generation:
    """As many tokens as requested: where the context is full, its latter half is the next prompt.

    Rows go together where their prompts are of one length, so that a row rolls where it would alone.
    """
    if request.cfg_scale or getattr(request.sampler, "record", False):
        raise ValueError("guidance and recordings end with the context: leave rolling_context or them out")
    context, mask = request.model.config.data.seq_len, request.model.tokenizer.mask
    tokens, count, nfe = np.full((len(ids), max_new_tokens), mask, np.int32), np.zeros(len(ids), np.int32), 0
    for width in sorted({len(row) for row in ids}):
        rows, turn = np.flatnonzero([len(row) == width for row in ids]), 0
        text = np.stack([ids[row] for row in rows])
        while len(rows) and count[rows[0]] < max_new_tokens:
            size, room = max_new_tokens - int(count[rows[0]]), context - text.shape[1]
            if size > room:  # whole canvases before the context is full
                canvas = getattr(request.sampler, "canvas_length", 1)
                size = room // canvas * canvas or room
            own = keys[rows]
            if turn:
                own = jax.vmap(lambda key, turn=turn: jax.random.fold_in(key, _ROLLING - turn))(own)
            generation = request(list(text), own, max_new_tokens=size)
            new, length = np.asarray(generation.tokens), np.asarray(generation.length)
            for row, tail in zip(rows, new, strict=True):
                tokens[row, count[row] : count[row] + size] = tail
            count[rows] += length
            nfe, turn = nfe + int(generation.nfe), turn + 1
            rows, text = rows[length == size], np.concatenate([text, new], axis=1)[length == size, -(context // 2) :]
            log.info("%d of %d rows continue after %d tokens", len(rows), len(ids), count.max())
    return Generation(
        tokens=jnp.asarray(tokens), length=jnp.asarray(count), nfe=jnp.asarray(nfe, jnp.int32), cache=None
    )


def _output(
    model: LoadedModel, generation: Generation, ids: list[np.ndarray], max_new_tokens: int | np.ndarray
) -> GenerationOutput:
    rows = [row[:n] for row, n in zip(np.asarray(generation.tokens), np.asarray(generation.length), strict=True)]
    if any((row < 0).any() for row in rows):  # categorical.INVALID
        raise ValueError("the network's logits were not finite: check its parameters, or compute in float32")
    if any(np.isin(row, model.tokenizer.stops).any() for row in rows):
        rows = [_before_stop(row, model.tokenizer.stops) for row in rows]
        length = jnp.asarray([len(row) for row in rows], jnp.int32)
        ended = jnp.arange(generation.tokens.shape[1], dtype=jnp.int32)[None] >= length[:, None]
        generation = generation.replace(tokens=jnp.where(ended, model.tokenizer.mask, generation.tokens), length=length)
    texts = [decode_continuation(model.tokenizer, prompt, row) for prompt, row in zip(ids, rows, strict=True)]
    return GenerationOutput(texts, generation, ids, max_new_tokens)


def _before_stop(row: np.ndarray, stops: tuple[int, ...]) -> np.ndarray:
    """The tokens before the first that ends an answer: a chat model's end of turn is not its end of text."""
    ends = np.flatnonzero(np.isin(row, stops))
    return row[: ends[0]] if len(ends) else row


def trace(
    model: LoadedModel, output: GenerationOutput, row: int, *, max_new_tokens: int, title: str, subtitle: str = ""
) -> Trace:
    """One row's generation, step by step, for `visualize`. Raises ValueError if it wasn't recorded."""
    history, prompt, mask = output.generation.history, output.prompt_ids[row], model.tokenizer.mask
    if history is None:
        raise ValueError("only canvases that were recorded can be shown: use --sampler=confidence or ancestral")
    made, start = np.asarray(history.steps), np.asarray(history.start)[:, row]
    width, length = history.tokens.shape[-1], len(prompt) + max_new_tokens
    text = np.full(max(int(start[made > 0].max()) + width, length), mask, np.int32)
    text[: len(prompt)] = prompt
    confidence = np.full(len(text), np.nan, np.float32)
    tokens, confidences = [], []
    for canvas in range(len(made)):
        here = slice(int(start[canvas]), int(start[canvas]) + width)
        for step in range(made[canvas]):
            text[here], confidence[here] = history.tokens[canvas, step, row], history.confidence[canvas, step, row]
            tokens.append(text.copy())
            confidences.append(confidence.copy())
    return trace_from_history(
        np.stack(tokens),
        np.stack(confidences),
        prompt_length=len(prompt),
        length=length,
        mask=mask,
        eos=model.tokenizer.eos,
        texts=model.tokenizer.pieces,
        title=title,
        subtitle=subtitle,
        canvas=np.repeat(np.arange(len(made)), made),
    )
