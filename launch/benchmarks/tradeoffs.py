"""Quality and cost of a trained network's samplers: the suite `tradeoffs` of launch.benchmark.

Three measurements on one checkpoint, each with rows and charts: quality by denoising steps and by speed, seconds by
output length, seconds of a forward pass by context length. Quality is the autoregressive likelihood under a judge,
another network (or this one, which favours its own autoregressive samples).
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.attention_patterns import Causal, Full
from diffusion_lm.build import LoadedModel, load_for_inference, read_text
from diffusion_lm.evaluation.generation_quality import judged, quality
from diffusion_lm.inference import pipeline, presets
from diffusion_lm.models import flops
from diffusion_lm.samplers.drafters import MaskedDraft, PromptLookup, TiDARDraft
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import EntropyBound, Threshold
from diffusion_lm.visualize.plots import curve
from launch.benchmarks import timing
from launch.benchmarks.timing import Row

log = logging.getLogger("diffusion_lm.tradeoffs")
NUM_TEXTS, PROMPT_LENGTH = 16, 16  # texts judged, and held-out tokens that each begins with
STEPS, PARTICLES = (1, 2, 4, 8, 16), 4
SHORT_CANVASES = (4, 16)  # tokens
SCHEDULES = {
    **{f"threshold {p}": Threshold(threshold=p) for p in (0.5, 0.9)},
    **{f"entropy bound {nats}": EntropyBound(bound=nats) for nats in (0.1, 1.0)},
}
LENGTH_STEPS = 12  # denoising steps a canvas where lengths are compared
LENGTHS = (1, 4, 16, 64, 256, 1024, 2048)  # as far as the context goes
SHORT, REPEATS = 64, 5  # short texts are timed five times as often


def tradeoffs(workdir: str, judge: str | None, beside: Sequence[str], out: Path) -> Iterator[list[Row]]:
    """The rows, a measurement at a time; writes charts into the folder `out`.

    beside: workdirs of other networks whose canvases are judged, too.

    Raises ValueError unless the objective is joint, and every run has the same tokenizer.
    """
    model = load_for_inference(workdir)
    if not (model.config.objective.trains_ar and model.config.objective.layout.denoises):
        raise ValueError(
            f"--workdir={workdir}: tradeoffs compares autoregressive and canvas sampling: train a joint objective"
        )
    judging = model if judge is None else load_for_inference(judge)
    others = {name: load_for_inference(name) for name in beside}
    for name, other in {f"--judge={judge}": judging, **{f"--beside={n}": o for n, o in others.items()}}.items():
        if other.tokenizer.fingerprint != model.tokenizer.fingerprint:
            raise ValueError(f"{name} has another tokenizer than --workdir={workdir}; train both with the same")
    if not judging.config.objective.trains_ar:
        raise ValueError(f"--judge={judge} has no autoregressive likelihood: train an ar or joint objective")
    out.mkdir(parents=True, exist_ok=True)
    yield _by_steps(model, judging, others, out)
    yield _by_length(model, out)
    yield _speculation(model)
    yield _by_context(model, out)


def _endless(model: LoadedModel) -> SamplingParams:
    """Without an end of text, so that all texts have one length."""
    return SamplingParams(suppressed=(*model.tokenizer.suppressed, model.tokenizer.eos))


# ---- quality by denoising steps ----


def _by_steps(model: LoadedModel, judge: LoadedModel, others: dict[str, LoadedModel], out: Path) -> list[Row]:
    """Each method at each number of steps: quality of many texts, and the speed of one, beside autoregression's."""
    texts, length = held_out_prompts(model), model.config.data.seq_len // 2 - PROMPT_LENGTH
    prompts = [model.tokenizer.decode(row[1:]) for row in texts]
    options = {"sampling": _endless(model)}
    plain = presets.autoregressive(model, sampling=_endless(model))
    particles = functools.partial(presets.particles, num_particles=PARTICLES)
    makers = {  # the network, how it is sampled, and the canvas: as in training, or short
        "ancestral": (model, presets.ancestral, 0),
        **{f"ancestral, canvases of {width}": (model, presets.ancestral, width) for width in SHORT_CANVASES},
        **{f"{name}, ancestral": (other, presets.ancestral, 0) for name, other in others.items()},
        f"{PARTICLES} particles": (model, particles, 0),
        "confidence": (model, presets.confidence, 0),
        "remasking": (model, presets.remasking, 0),
    }
    methods = {"autoregressive": (model, {"": plain})}
    for name, (network, make, width) in makers.items():
        made = {n: make(network, denoising_steps=n, canvas_length=width, **options) for n in STEPS if n <= (width or n)}
        methods[name] = network, {f", {n} step{'s' * (n > 1)}": sampler for n, sampler in made.items()}
    for name, schedule in SCHEDULES.items():
        free = presets.confidence(model, schedule=schedule, denoising_steps=STEPS[-1], canvas_length=0, **options)
        methods[name] = model, {"": free}
    rows, lines = [], {name: [] for name in methods}
    for name, (network, samplers) in methods.items():
        for steps, sampler in samplers.items():
            row = _judged_row(network, judge, name + steps, sampler, texts=texts, prompts=prompts, length=length)
            both = {"plain": (model, plain), "": (network, sampler)}
            cases = {of: functools.partial(_generated, *each, length) for of, each in both.items()}
            timings = timing.alternate(cases, repeats=REPEATS)
            speed, ratio = length / timings[""].wall, timing.times_faster(timings[""], timings["plain"])
            note = f"{row.note}, {speed:,.0f} tokens/s, {ratio:.2f} x autoregressive"
            log.info("%s: %.3f nats/token, %s", row.name, row.value, note)
            rows.append(dataclasses.replace(row, note=note))
            lines[name].append((ratio, row.value))
    labels = {"y_label": "nats per token, by the judge"}
    by_steps = {name: [nats for _, nats in lines[name]] for name in makers}
    counts = {name: STEPS[: len(nats)] for name, nats in by_steps.items()}
    by_steps["autoregressive"], counts["autoregressive"] = [lines["autoregressive"][0][1]] * len(STEPS), STEPS
    steps = {"x_label": "denoising steps a canvas", "title": "Quality by denoising steps"}
    curve(counts, by_steps, out / "quality.svg", log_x=True, **steps, **labels)
    faster, nats = ({name: [pair[i] for pair in pairs] for name, pairs in lines.items()} for i in (0, 1))
    speeds = {"x_label": "times as fast as autoregression, batch size 1", "title": "Quality by speed"}
    curve(faster, nats, out / "frontier.svg", log_x=True, **speeds, **labels)
    return rows


def _judged_row(model: LoadedModel, judge: LoadedModel, name: str, sampler: Any, *, texts, prompts, length: int) -> Row:
    prompts = [prompt for prompt in prompts for _ in range(_rows_of_a_text(sampler))]
    generation = pipeline.generate(model, sampler, prompts, max_new_tokens=length, seed=0).generation
    rows = np.concatenate([texts, np.asarray(generation.tokens)[:: _rows_of_a_text(sampler)]], axis=1)
    found = quality(_JUDGE(judge.network, rows), rows, PROMPT_LENGTH)
    note = f"entropy {found.entropy:.2f}, repeated 4-grams {found.repeated:.3f}, "
    note += f"{length / int(generation.nfe):.2f} tokens a pass"
    return Row(name=name, value=found.nats_per_token, unit="nats/token", note=note)


def _rows_of_a_text(sampler: Any) -> int:
    return getattr(sampler, "num_particles", 1)


_JUDGE = jax.jit(lambda bound, rows: judged(bound.denoise, rows))


def held_out_prompts(model: LoadedModel) -> np.ndarray:
    """Begin of text, then held-out text from evenly spaced places: int32 [NUM_TEXTS, PROMPT_LENGTH]."""
    text = read_text(model.config, model.meta).valid
    windows = np.lib.stride_tricks.sliding_window_view(
        text.flat if text else np.zeros(PROMPT_LENGTH), PROMPT_LENGTH - 1
    )
    inside = np.flatnonzero(~np.isin(windows, (model.tokenizer.mask, model.tokenizer.eos)).any(axis=1))
    if text is None or len(inside) < NUM_TEXTS:
        raise ValueError(
            "prompts are taken from held-out text, and the run holds out too little: raise data.val_fraction"
        )
    starts = inside[np.linspace(0, len(inside) - 1, NUM_TEXTS).astype(int)]
    return np.pad(windows[starts], ((0, 0), (1, 0)), constant_values=text.bos).astype(np.int32)


# ---- seconds by output length ----


def _by_length(model: LoadedModel, out: Path) -> list[Row]:
    """One row of text, of one token up to the whole context."""
    longest = min(LENGTHS[-1], model.config.data.seq_len - 1)
    lengths = [n for n in LENGTHS if n < longest] + [longest]
    draw = _endless(model)
    steps = min(LENGTH_STEPS, model.config.objective.layout.canvas_length(model.config.data.seq_len))
    samplers = {
        "autoregressive": presets.autoregressive(model, sampling=draw),
        f"diffusion, {steps} steps": presets.ancestral(model, sampling=draw, canvas_length=0, denoising_steps=steps),
        "speculative": presets.speculative(model, sampling=draw),
        "auto": presets.auto(model, sampling=draw, canvas_length=0, denoising_steps=steps),
    }
    rows, lines = [], {name: [] for name in samplers}
    for length in lengths:
        cases = {name: functools.partial(_generated, model, sampler, length) for name, sampler in samplers.items()}
        timings = timing.alternate(cases, repeats=REPEATS * (5 if length <= SHORT else 1))
        first = timings["autoregressive"]
        log.info("%d tokens: %s", length, ", ".join(f"{name} {1e3 * t.wall:.1f} ms" for name, t in timings.items()))
        for name, timed in timings.items():
            lines[name].append(timed.wall)
            ratio = timing.times_faster(timed, first)
            note = f"{length / timed.wall:,.0f} tokens/s"
            rows.append(Row(name=f"{name}, {length} tokens", value=1e3 * timed.wall, unit="ms", ratio=ratio, note=note))
    plain, diffusion, *_ = (np.log(seconds) for seconds in lines.values())
    crossings = np.exp(_crossings(np.log(lengths), plain, diffusion))
    curve(
        lengths,
        lines,
        out / "length.svg",
        title="Time by output length, batch size 1",
        x_label="new tokens",
        y_label="time of a generation",
        marks={f"equal at {x:,.0f} tokens": x for x in crossings},
        log_x=True,
        log_y=True,
        y_unit="s",
    )
    name, note = "diffusion is as fast as autoregressive", "interpolated between measured lengths"
    return rows + [Row(name=name, value=float(x), unit="tokens", note=note) for x in crossings]


def _crossings(at: np.ndarray, one: np.ndarray, other: np.ndarray) -> list[float]:
    """Where two piecewise linear functions over `at` cross."""
    gap = one - other
    turns = np.flatnonzero(gap[:-1] * gap[1:] < 0)
    return [float(at[i] + (at[i + 1] - at[i]) * gap[i] / (gap[i] - gap[i + 1])) for i in turns]


def _speculation(model: LoadedModel) -> list[Row]:
    """Each drafter compared with autoregressive sampling, at both temperatures, up to the whole context; and the latter
    compared with itself, which shows the noise of a ratio."""
    length, rows = min(LENGTHS[-1], model.config.data.seq_len - 1), []
    drafters = {"lookup": PromptLookup(), "masked": MaskedDraft(mask=model.tokenizer.mask), "tidar": TiDARDraft()}
    for temperature in (0.0, 1.0):
        draw = dataclasses.replace(_endless(model), temperature=temperature)
        plain = presets.autoregressive(model, sampling=draw)
        drafted = {
            name: presets.speculative(model, sampling=draw, drafter=drafter) for name, drafter in drafters.items()
        }
        samplers = {"": plain, "itself": plain, **drafted}
        cases = {name: functools.partial(_generated, model, sampler, length) for name, sampler in samplers.items()}
        timings, text = timing.alternate(cases, repeats=3 * REPEATS), np.asarray(cases[""]())
        where, compared = f"temperature {temperature:g}, {length} tokens", functools.partial(_compared, timings, length)
        rows.append(compared("itself", f"autoregressive compared with itself, {where}"))
        for name, sampler in drafted.items():
            found = pipeline.generate(model, sampler, [""], max_new_tokens=length, seed=0).generation
            same = float(np.mean(np.asarray(found.tokens) == text))
            note = f"{length / int(found.nfe):.2f} tokens a pass, {same:.0%} of tokens equal, a round costs "
            texts = {"target": "ratio >= 1.4, never below 0.97", "note": f"{note}{sampler.break_even:.1f} steps"}
            rows.append(compared(name, f"speculative, {name} drafts, {where}", **texts))
    return rows


def _compared(timings: dict[str, timing.Timing], length: int, case: str, name: str, **texts) -> Row:
    """A case's tokens/s compared with autoregressive sampling."""
    row = Row(name=name, value=length / timings[case].wall, unit="tokens/s", **texts)
    return timing.compared(row, timings[case], timings[""], length)


def _generated(model: LoadedModel, sampler: Any, length: int):
    prompts = [""] * _rows_of_a_text(sampler)
    return pipeline.generate(model, sampler, prompts, max_new_tokens=length, seed=0).generation.tokens


# ---- seconds of a pass by context ----


def _by_context(model: LoadedModel, out: Path) -> list[Row]:
    """A pass over one canvas after more and more text: with the cache, and recomputing the text."""
    canvas = model.config.objective.layout.canvas_length(model.config.data.seq_len)
    contexts = [n for n in (0, 64, 256, 1024, 4096) if n + canvas <= model.config.data.seq_len]
    bound = model.for_sampling(canvas)
    rows, lines = [], {"with the cache": [], "without": []}
    for context in contexts:
        cache = bound.empty_cache(1, max(context, 1))
        cache = cache.replace(length=jnp.full(1, context, jnp.int32))
        cases = {
            "with the cache": functools.partial(_cached, bound, cache, jnp.zeros((1, canvas), jnp.int32)),
            "without": functools.partial(_whole, bound, jnp.zeros((1, context + canvas), jnp.int32)),
        }
        timings = timing.alternate(cases, repeats=15)
        for name, timed in timings.items():
            lines[name].append(timed.best)
        flops = [_flops(model, tokens, context + canvas) for tokens in (canvas, context + canvas)]
        note = f"{flops[0] / 1e6:,.1f} and {flops[1] / 1e6:,.1f} MFLOP"
        ratio = timings["without"].best / timings["with the cache"].best
        cached, recomputed = (1e3 * seconds[-1] for seconds in lines.values())
        name = f"a pass after {context} tokens"
        rows.append(Row(name=name, value=cached, unit="ms", reference=recomputed, ratio=ratio, note=note))
    labels = {"x_label": "tokens of context", "y_label": "time of a forward pass", "y_unit": "s"}
    curve(contexts, lines, out / "context.svg", title=f"A forward pass over a canvas of {canvas}", **labels)
    return rows


@jax.jit
def _cached(bound, cache, canvas):
    return bound.denoise_canvas(cache, canvas, jnp.full(canvas.shape[0], 0.5))


@jax.jit
def _whole(bound, tokens):
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    t = jnp.full((tokens.shape[0], 1), 0.5)
    return bound.denoise(tokens, t, attention=Full(), positions=at, segment_ids=jnp.ones_like(tokens)).logits()


def _flops(model: LoadedModel, tokens: int, keys: int) -> float:
    """Of a forward pass over `tokens` that each attend to `keys`: 2 a weight, 4 a key and attention channel."""
    return tokens * flops.of_pass(model.network.module, rows=1, length=1, attention=Causal(), past=keys - 1)
