"""The front door: load, generate, infill, log_likelihood, train and evaluate, which `import diffusion_lm` exports."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_lm.build import LoadedModel, build, build_elbo, load_for_inference, read_text
from diffusion_lm.config import Config
from diffusion_lm.convert.loading import PACKAGE, load_source
from diffusion_lm.data import loader
from diffusion_lm.data.corpora import Corpus, Texts
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.data.source import Data
from diffusion_lm.data.tokenizer import encode_prompt
from diffusion_lm.evaluation.likelihood import Estimate, held_out
from diffusion_lm.inference import pipeline, streaming
from diffusion_lm.inference.by_name import made_for
from diffusion_lm.objectives.autoregressive import next_token_nats, read_causally
from diffusion_lm.training import loop
from diffusion_lm.types import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """Generated texts. str() and print() give them, one a line; `text` is the only one.

    texts       one a prompt: what follows it (of `infill`, the whole text)
    num_tokens  tokens of each
    nfe         forward passes of the network
    output      the ids, the cache and the history (see `pipeline.GenerationOutput`)
    """

    texts: tuple[str, ...]
    num_tokens: tuple[int, ...]
    nfe: int
    output: pipeline.GenerationOutput = dataclasses.field(repr=False)

    @property
    def text(self) -> str:
        """The only text. Raises ValueError if there are several."""
        if len(self.texts) != 1:
            raise ValueError(f"there are {len(self.texts)} texts: use .texts")
        return self.texts[0]

    def __str__(self) -> str:
        return "\n".join(self.texts)


def load(workdir: Path | str, checkpoint_step: int | None = None, allow_import: Sequence[str] = ()) -> LoadedModel:
    """Loads a trained network, onto this process's first device.

    Args:
      workdir: the folder of a run. Or somebody's model: a Hugging Face folder, a GGUF file, or package:NAME.
      checkpoint_step: the checkpoint's step; None: the newest.
      allow_import: modules and packages of your own whose classes the checkpoint may name. No others are imported.

    Raises FileNotFoundError, CheckpointError or ValueError with one line.
    """
    path = Path(workdir)
    if str(workdir).startswith(PACKAGE) or path.is_file() or (path / "config.json").is_file():
        return load_source(workdir)
    return load_for_inference(workdir, step=checkpoint_step, allow_import=allow_import)


def generate(
    model: LoadedModel,
    prompts: str | Sequence[str] = "",
    *,
    max_new_tokens: int | None = None,
    sampler: Any = None,
    denoising_steps: int | None = None,
    canvas_length: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    rolling_context: bool = False,
    **options,
) -> Generated:
    """Generates text after each prompt. The same seed and prompt give the same text, in any batch.

    What is None is what a converted model's published sampler and its generation_config.json say, if that sampler is
    used (see `inference.published`); else the value in brackets.

    Args:
      model: what `load` returns.
      prompts: one text or several; "" begins a new document.
      max_new_tokens: tokens after each prompt, at most (256).
      sampler: see `make_sampler`; None: a converted model's published one, else the one that fits the network.
      denoising_steps: forward passes a canvas, at most (12, or as many as the sampler needs).
      canvas_length: tokens that are denoised together; 0: as in training.
      temperature, top_k, top_p, min_p: see `SamplingParams` (1.0, 0, 1.0, 0.0).
      cfg_scale: classifier-free guidance scale s, (1 + s) conditional - s unconditional logits (0, which is off).
      seed: of all draws.
      rolling_context: forget the oldest tokens once the context is full.
      options: fields of the sampler, such as schedule=Threshold(...); settings of a published one, by its own names.

    Raises ValueError for a sampler or options that don't fit the network, and for what its context can't hold.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    shape = {"denoising_steps": denoising_steps, "canvas_length": canvas_length}
    made = made_for(model, sampler, drawn, **shape, **options)
    new = made.new_tokens(model, prompts) if max_new_tokens is None else max_new_tokens
    output = pipeline.generate(
        model, made.sampler, prompts, max_new_tokens=new, seed=seed,
        cfg_scale=made.cfg_scale if cfg_scale is None else cfg_scale, rolling_context=rolling_context,
    )  # fmt: skip
    return _generated(output, output.texts)


def stream(
    model: LoadedModel,
    prompt: str = "",
    *,
    max_new_tokens: int | None = None,
    sampler: Any = None,
    denoising_steps: int | None = None,
    canvas_length: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    **options,
) -> Iterator[str]:
    """Generates text after one prompt, piece by piece: by token, round of drafts or canvas. Pieces are whole
    characters and join to the text of `generate`, whose arguments and errors these are; it ends before the first
    string of `stop`. `inference.streaming.stream` also shows each pass over a canvas."""
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    made = made_for(model, sampler, drawn, denoising_steps=denoising_steps, canvas_length=canvas_length, **options)
    passes = streaming.stream(
        model, made.sampler, prompt, seed=seed, stop=stop,
        max_new_tokens=made.new_tokens(model, [prompt]) if max_new_tokens is None else max_new_tokens,
        cfg_scale=made.cfg_scale if cfg_scale is None else cfg_scale,
    )  # fmt: skip
    return (piece for piece, _ in passes if piece)


def infill(
    model: LoadedModel,
    texts: Sequence,
    *,
    sampler: Any = None,
    denoising_steps: int | None = None,
    canvas_length: int = 0,
    temperature: float | None = None,
    seed: int = 0,
    **options,
) -> Generated:
    """Fills holes: `texts` is a list of strings and of numbers of missing tokens, ["Return the ", 3, " list."]; or
    several such lists. The other arguments are those of `generate`. The result's texts are whole.

    Raises ValueError for a text without a hole, or one that the context or canvas can't hold.
    """
    texts = [texts] if texts and isinstance(texts[0], str | int) else list(texts)
    shape = {"denoising_steps": denoising_steps, "canvas_length": canvas_length}
    made = made_for(model, sampler, {"temperature": temperature}, **shape, **options)
    if made.cfg_scale:
        raise ValueError(f"infilling goes without cfg_scale={made.cfg_scale}: set cfg_scale=0.0")
    output = pipeline.infill(model, made.sampler, texts, seed=seed)
    first = [text[0] if isinstance(text[0], str) else "" for text in texts]
    return _generated(output, [start + rest for start, rest in zip(first, output.texts, strict=True)])


def _generated(output: pipeline.GenerationOutput, texts: Sequence[str]) -> Generated:
    counts = tuple(int(n) for n in output.generation.length)
    return Generated(tuple(texts), counts, int(output.generation.nfe), output)


class LogLikelihood(NamedTuple):
    """Log probabilities of texts, end of text included, in nats.

    values           float64 [n]  log p, or a lower bound of it
    standard_errors  float64 [n]  Monte Carlo error of each bound; 0 if exact
    num_tokens       int [n]      tokens of each text, end of text included
    exact            whether `values` are exact
    token_values     a float64 array for each text: log p of its tokens, which sum to the text's; (): a bound has none
    """

    values: np.ndarray
    standard_errors: np.ndarray
    num_tokens: np.ndarray
    exact: bool
    token_values: tuple[np.ndarray, ...] = ()


def log_likelihood(
    model: LoadedModel,
    texts: str | Sequence[str],
    *,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    seq_len: int | None = None,
) -> LogLikelihood:
    """The log probability of each text: exact if the network was trained autoregressively, else the ELBO.

    A text that is longer than a row is cut into rows; a row after the first is conditioned on one token. A
    text's value doesn't depend on the other texts.

    Args:
      model: what `load` returns.
      texts: one or several, without an end of text. They must have a token.
      draws: of noise, at least 2; a bound is their mean.
      seed: of the noise.
      batch_size: rows a forward pass.
      seq_len: positions a row, at most the network's context; None: its context, which of a converted model is long.

    Raises ValueError for text without a token.
    """
    seq_len = _seq_len(model, seq_len)
    if draws < 2 or batch_size < 1:
        raise ValueError(f"draws must be at least 2 and batch_size at least 1; got {draws} and {batch_size}")
    texts, objective = [texts] if isinstance(texts, str) else list(texts), model.config.objective
    for text in texts:
        encode_prompt(model.tokenizer, text)
    rows, owner, number, counts = [], [], [], []
    for i, text in enumerate(texts):
        tokens = loader.tokenize(Texts(texts=(text,)), model.tokenizer, pad=objective.layout.pad, name="a text")
        own = list(loader.eval_batches(tokens, length=seq_len, batch=1))
        rows, owner, number = rows + own, owner + [i] * len(own), [*number, *range(len(own))]
        counts.append(tokens.targets)
    if objective.trains_ar:
        of = [[] for _ in texts]
        for whose, nats in zip(owner, _token_nats(model, rows, batch_size), strict=True):
            of[whose].append(nats)
        each = tuple(-np.concatenate(nats) for nats in of)
        return LogLikelihood(
            np.array([own.sum() for own in each]), np.zeros(len(texts)), np.asarray(counts), True, each
        )
    sums = np.zeros((len(texts), draws))
    np.add.at(sums, owner, _canvas_nats(model, rows, number, draws, seed, batch_size))
    error = sums.std(axis=1, ddof=1) / np.sqrt(draws)
    return LogLikelihood(-sums.mean(axis=1), error, np.asarray(counts), False)


def _canvas_nats(
    model: LoadedModel, rows: list[Batch], number: list[int], draws: int, seed: int, batch_size: int
) -> np.ndarray:
    """float64 [rows, draws]: the bound of each row at each draw of noise, which depends on the row's number."""
    loss = build_elbo(model.config, model.network.module, model.process)

    @jax.jit
    def nats(params, keys, batch):
        def of_row(key, row):
            return loss(params, key, jax.tree.map(lambda a: a[None], row), {})["canvas"].sum

        return jax.vmap(of_row)(keys, batch)

    found, fold = np.zeros((len(rows), draws)), jax.vmap(jax.random.fold_in, (None, 0))
    for first, batch in _full_batches(rows, batch_size):
        here = number[first : first + batch_size]
        keys = np.pad(here, (0, batch_size - len(here)))
        for draw in range(draws):
            drawn = nats(model.network.params, fold(jax.random.fold_in(jax.random.key(seed), draw), keys), batch)
            found[first : first + len(here), draw] = np.asarray(drawn)[: len(here)]
    return found


def _full_batches(rows: list[Batch], batch_size: int) -> Iterator[tuple[int, Batch]]:
    """(number of its first row, batch) of rows [1, L]; the last is filled up with rows of zeros."""
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        some += [jax.tree.map(np.zeros_like, rows[0])] * (batch_size - len(some))
        yield first, jax.tree.map(lambda *parts: np.concatenate(parts), *some)


def _token_nats(model: LoadedModel, rows: list[Batch], batch_size: int) -> list[np.ndarray]:
    """-log p of each row's targets, in order, float64."""

    @jax.jit
    def nats(network, batch):
        return next_token_nats(read_causally(network.denoise, batch), batch)

    found = []
    for first, batch in _full_batches(rows, batch_size):
        values = np.asarray(nats(model.network, batch), np.float64)
        for own, row in zip(values, rows[first : first + batch_size], strict=False):
            found.append(own[1:][row.loss_mask[0, 1:]])  # the first is context
    return found


def train(config: Config, workdir: Path | str) -> loop.Result:
    """Trains what a config describes, or resumes where the workdir left off; returns steps, metrics and checkpoint.

    Raises ValueError, OSError or CheckpointError with one line before the first step, NonFiniteError after it.
    """
    run = build(config, workdir)
    return loop.run(run.job, config.train, workdir, run.checkpoints)


class Evaluation(NamedTuple):
    """Estimates for every part of the objective ("causal", "canvas"), and the size of the text.

    tokens  text tokens and ends of text
    bytes   of the text in UTF-8
    """

    parts: dict[str, Estimate]
    tokens: int
    bytes: int


def evaluate(
    model: LoadedModel,
    data: str | Corpus | PromptResponse | None = None,
    *,
    draws: int = 2,
    batch_size: int = 16,
    seq_len: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluates a network's likelihood of text: nats per token, bits per byte, with the Monte Carlo standard error.

    Args:
      model: what `load` returns.
      data: a path (see `Data.path`), a corpus, or the held-out part of records of prompts and answers, of which only
        answers are scored; None: the held-out part of what the network was trained on.
      draws: of noise for each batch, at least 2.
      batch_size: rows a batch.
      seq_len: positions a row, at most the network's context; None: its context, which of a converted model is long.
      seed: of the noise.

    Raises ValueError or OSError if there is no such text.
    """
    config, seq_len = model.config, _seq_len(model, seq_len)
    records = data if data is not None else config.data
    if isinstance(records, PromptResponse):
        records = dataclasses.replace(records, seq_len=min(seq_len, records.seq_len))
        opened = records.open(config.objective.layout, tokenizer=model.tokenizer)
        tokens, batches = opened.valid, opened.valid_batches(length=records.seq_len, batch=batch_size)
    elif data is None:
        tokens = read_text(config, model.meta).valid
    else:
        corpus = documents(model, data)
        tokens = loader.tokenize(corpus, model.tokenizer, pad=config.objective.layout.pad)
    if tokens is None:
        raise ValueError("nothing is held out (data.val_fraction=0): name a text with --data (data=)")
    if not isinstance(records, PromptResponse):
        batches = loader.eval_batches(tokens, length=seq_len, batch=batch_size)
    found = held_out(model.elbo(), batches, tokens, jax.random.key(seed), draws=draws)
    return Evaluation(found, tokens.targets, tokens.bytes)


def documents(model: LoadedModel, data: str | Corpus) -> Corpus:
    """The documents of a path, divided as those that the network was trained on; of a converted model, by `Data`."""
    form = model.config.data
    form = form if isinstance(form, Data) else Data(path="", seq_len=form.seq_len)
    return dataclasses.replace(form, path=data).corpus()


def _seq_len(model: LoadedModel, seq_len: int | None) -> int:
    context = model.config.data.seq_len
    seq_len = context if seq_len is None else seq_len
    if not 2 <= seq_len <= context:
        raise ValueError(f"seq_len={seq_len} must lie in 2..{context}, the network's context")
    return seq_len
