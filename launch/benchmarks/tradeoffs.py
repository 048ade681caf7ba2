"""What a trained network's ways of writing cost and bring: the suite `tradeoffs` of launch.benchmark.

Three measurements on one checkpoint, each a table of rows and a chart: quality by passes, seconds by output length,
seconds a pass by context length. Quality is told by a judge, another network's causal reading (or, without one, this
network's own, which flatters its causal text).
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.attention_patterns import Full
from diffusion_lm.build import LoadedModel, load_for_inference, read_text
from diffusion_lm.evaluation.generation_quality import judged, quality
from diffusion_lm.inference import presets
from diffusion_lm.samplers.drafters import MaskedDraft, PromptLookup, TiDARDraft
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import EntropyBound, Threshold
from diffusion_lm.visualize.plots import curve
from launch.benchmarks import timing
from launch.benchmarks.timing import Row

log = logging.getLogger("diffusion_lm.tradeoffs")
TEXTS, GIVEN = 16, 16  # texts judged, and how many held-out tokens each begins with
PASSES = (1, 2, 4, 8, 16)
DIALS = {
    **{f"threshold {p}": Threshold(least=p) for p in (0.5, 0.9)},
    **{f"entropy bound {nats}": EntropyBound(bound=nats) for nats in (0.1, 1.0)},
}
WRITTEN_IN = 12  # passes a canvas, where lengths are compared
LENGTHS = (1, 4, 16, 64, 256, 1024, 2048)  # as far as the context goes
SHORT, REPEATS = 64, 5  # short answers are timed five times as often


def tradeoffs(workdir: str, judge: str | None, out: Path) -> list[Row]:
    """All rows; charts are written into the folder `out`. Raises ValueError for a network that writes one way only."""
    model = load_for_inference(workdir)
    if not (model.config.objective.trains_ar and model.config.objective.layout.denoises):
        raise ValueError(f"--workdir={workdir}: tradeoffs compares both ways of writing: train a joint objective")
    judging = model if judge is None else load_for_inference(judge)
    if judging.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise ValueError(f"--judge={judge} has another tokenizer than --workdir={workdir}; train both with one")
    if not judging.config.objective.trains_ar:
        raise ValueError(f"--judge={judge} reads no text causally: train an ar or joint objective")
    out.mkdir(parents=True, exist_ok=True)
    return [*_by_passes(model, judging, out), *_by_length(model, out), *_speculation(model), *_by_context(model, out)]


def _draw(model: LoadedModel) -> SamplingParams:
    """No end of text: all write equally much."""
    return SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))


# ---- quality by passes ----


def _by_passes(model: LoadedModel, judge: LoadedModel, out: Path) -> list[Row]:
    texts, length = begun(model), model.config.data.seq_len // 2 - GIVEN
    prompts = [model.tokenizer.decode(row[1:]) for row in texts]
    ask = functools.partial(_judged_row, model, judge, texts=texts, prompts=prompts, length=length)
    rows = [ask("autoregressive", presets.autoregressive(model, draw=_draw(model)))]
    lines = {"autoregressive": [rows[0].value] * len(PASSES)}
    options = {"draw": _draw(model), "canvas": 0}
    makers = {"ancestral": presets.ancestral, "confidence": presets.confidence, "remasking": presets.remasking}
    for name, make in makers.items():
        found = [ask(f"{name}, {n} pass{'es' * (n > 1)}", make(model, passes=n, **options)) for n in PASSES]
        lines[name], rows = [row.value for row in found], rows + found
    for name, pace in DIALS.items():
        rows.append(ask(name, presets.confidence(model, pace=pace, passes=PASSES[-1], **options)))
    labels = {"x_label": "log2 of the passes a canvas", "y_label": "nats a token, by the judge"}
    curve(np.log2(PASSES), lines, out / "quality.svg", title="Quality by passes", **labels)
    return rows


def _judged_row(model: LoadedModel, judge: LoadedModel, name: str, writer: Any, *, texts, prompts, length: int) -> Row:
    generation = presets.write(model, writer, prompts, length=length, seed=0).generation
    written = np.concatenate([texts, np.asarray(generation.tokens)], axis=1)
    found = quality(_ASK(judge.bound, written), written, GIVEN)
    a_pass = length / int(generation.nfe)
    note = f"entropy {found.entropy:.2f}, repeated 4-grams {found.repeated:.3f}, {a_pass:.2f} tokens a pass"
    log.info("%s: %.3f nats/token, %s", name, found.nats_per_token, note)
    return Row(name=name, value=found.nats_per_token, unit="nats/token", note=note)


_ASK = jax.jit(lambda bound, rows: judged(bound.denoise, rows))


def begun(model: LoadedModel) -> np.ndarray:
    """Begin of text and what follows evenly spaced places of held-out documents: int32 [TEXTS, GIVEN]."""
    text = read_text(model.config, model.meta).valid
    windows = np.lib.stride_tricks.sliding_window_view(text.flat if text else np.zeros(GIVEN), GIVEN - 1)
    inside = np.flatnonzero(~np.isin(windows, (model.tokenizer.mask, model.tokenizer.eos)).any(axis=1))
    if text is None or len(inside) < TEXTS:
        raise ValueError("tradeoffs begins texts with held-out ones, and the corpus holds out too few")
    starts = inside[np.linspace(0, len(inside) - 1, TEXTS).astype(int)]
    return np.pad(windows[starts], ((0, 0), (1, 0)), constant_values=text.bos).astype(np.int32)


# ---- seconds by output length ----


def _by_length(model: LoadedModel, out: Path) -> list[Row]:
    """One row of text at a time, from one token on up to the context."""
    longest = min(LENGTHS[-1], model.config.data.seq_len - 1)
    lengths = [n for n in LENGTHS if n < longest] + [longest]
    draw = _draw(model)
    passes = min(WRITTEN_IN, model.config.objective.layout.canvas_length(model.config.data.seq_len))
    writers = {
        "autoregressive": presets.autoregressive(model, draw=draw),
        f"diffusion, {passes} passes": presets.ancestral(model, draw=draw, canvas=0, passes=passes),
        "speculative": presets.speculative(model, draw=draw),
        "auto": presets.auto(model, draw=draw, canvas=0, passes=passes),
    }
    rows, lines = [], {name: [] for name in writers}
    for length in lengths:
        legs = {name: functools.partial(_written, model, writer, length) for name, writer in writers.items()}
        timings = timing.alternate(legs, repeats=REPEATS * (5 if length <= SHORT else 1))
        first = timings["autoregressive"]
        log.info("%d tokens: %s", length, ", ".join(f"{name} {1e3 * t.wall:.1f} ms" for name, t in timings.items()))
        for name, timed in timings.items():
            lines[name].append(timed.wall)
            ratio = timing.times_faster(timed, first)
            note = f"{length / timed.wall:,.0f} tokens/s"
            rows.append(Row(name=f"{name}, {length} tokens", value=1e3 * timed.wall, unit="ms", ratio=ratio, note=note))
    labels = {"x_label": "log2 of the tokens written", "y_label": "log10 of seconds"}
    at, logs = np.log2(lengths), {name: np.log10(seconds) for name, seconds in lines.items()}
    plain, diffusion, *_ = logs.values()
    crossings = _crossings(at, plain, diffusion)
    marks = {f"as fast at {2**x:,.0f} tokens": x for x in crossings}
    curve(at, logs, out / "length.svg", title="Seconds by output length, batch 1", marks=marks, **labels)
    name = "diffusion as fast as autoregression"
    return rows + [Row(name=name, value=2**x, unit="tokens", note="between lengths measured") for x in crossings]


def _crossings(at: np.ndarray, one: np.ndarray, other: np.ndarray) -> list[float]:
    """Where two lines over `at` cross, straight between its points."""
    gap = one - other
    turns = np.flatnonzero(gap[:-1] * gap[1:] < 0)
    return [float(at[i] + (at[i + 1] - at[i]) * gap[i] / (gap[i] - gap[i + 1])) for i in turns]


def _speculation(model: LoadedModel) -> list[Row]:
    """Each way of drafting against autoregression, as far as the context goes, at both temperatures; and autoregression
    against itself, which says what a ratio is worth."""
    length, rows = min(LENGTHS[-1], model.config.data.seq_len - 1), []
    drafters = {"lookup": PromptLookup(), "canvas": MaskedDraft(mask=model.tokenizer.mask), "forked": TiDARDraft()}
    for temperature in (0.0, 1.0):
        draw = dataclasses.replace(_draw(model), temperature=temperature)
        plain = presets.autoregressive(model, draw=draw)
        ways = {name: presets.speculative(model, draw=draw, drafter=drafter) for name, drafter in drafters.items()}
        all_ways = {"": plain, "itself": plain, **ways}
        legs = {name: functools.partial(_written, model, way, length) for name, way in all_ways.items()}
        timings, text = timing.alternate(legs, repeats=3 * REPEATS), np.asarray(legs[""]())
        where, beside = f"temperature {temperature:g}, {length} tokens", functools.partial(_beside, timings, length)
        rows.append(beside("itself", f"autoregressive beside itself, {where}"))
        for name, way in ways.items():
            found = presets.write(model, way, [""], length=length, seed=0).generation
            same = float(np.mean(np.asarray(found.tokens) == text))
            note = f"{length / int(found.nfe):.2f} tokens a pass, {same:.0%} of tokens the same, a cycle costs "
            told = {"target": "ratio >= 1.4, never below 0.97", "note": f"{note}{way.break_even:.1f} steps"}
            rows.append(beside(name, f"speculative, {name} drafts, {where}", **told))
    return rows


def _beside(timings: dict[str, timing.Timing], length: int, leg: str, name: str, **told) -> Row:
    """A leg's tokens/s beside autoregression's."""
    row = Row(name=name, value=length / timings[leg].wall, unit="tokens/s", **told)
    return timing.beside(row, timings[leg], timings[""], length)


def _written(model: LoadedModel, writer: Any, length: int):
    return presets.write(model, writer, [""], length=length, seed=0).generation.tokens


# ---- seconds a pass by context ----


def _by_context(model: LoadedModel, out: Path) -> list[Row]:
    """One canvas behind ever more text: over the cache, and reading all of the text again in each pass."""
    canvas = model.config.objective.layout.canvas_length(model.config.data.seq_len)
    contexts = [n for n in (0, 64, 256, 1024, 4096) if n + canvas <= model.config.data.seq_len]
    bound = model.for_sampling(canvas)
    rows, lines = [], {"with the cache": [], "without": []}
    for context in contexts:
        cache = bound.empty_cache(1, max(context, 1))
        cache = cache.replace(length=jnp.full(1, context, jnp.int32))
        legs = {
            "with the cache": functools.partial(_cached, bound, cache, jnp.zeros((1, canvas), jnp.int32)),
            "without": functools.partial(_whole, bound, jnp.zeros((1, context + canvas), jnp.int32)),
        }
        timings = timing.alternate(legs, repeats=15)
        for name, timed in timings.items():
            lines[name].append(1e3 * timed.best)
        flops = [_flops(model, tokens, context + canvas) for tokens in (canvas, context + canvas)]
        note = f"{flops[0] / 1e6:,.1f} and {flops[1] / 1e6:,.1f} MFLOP"
        ratio = timings["without"].best / timings["with the cache"].best
        rows.append(Row(name=f"a pass behind {context} tokens", value=lines["with the cache"][-1], unit="ms",
                        reference=lines["without"][-1], ratio=ratio, note=note))  # fmt: skip
    labels = {"x_label": "tokens of context", "y_label": "milliseconds a pass"}
    curve(contexts, lines, out / "context.svg", title=f"A pass over a canvas of {canvas}", **labels)
    return rows


@jax.jit
def _cached(bound, cache, canvas):
    return bound.read_canvas(cache, canvas, jnp.full(canvas.shape[0], 0.5))


@jax.jit
def _whole(bound, tokens):
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    t = jnp.full((tokens.shape[0], 1), 0.5)
    return bound.denoise(tokens, t, attention=Full(), positions=at, segment_ids=jnp.ones_like(tokens)).logits()


def _flops(model: LoadedModel, tokens: int, seen: int) -> float:
    """Of a forward pass over `tokens` that each see `seen`: two a weight of a product, four a width and key."""
    a = model.config.model.resolved
    weights = a.width * a.head_dim * (2 * a.heads + 2 * a.kv_heads) + 3 * a.width * a.mlp_dim
    attention = 4 * a.heads * a.head_dim * seen
    return tokens * (a.layers * (2 * weights + attention) + 2 * a.width * model.tokenizer.vocab)
