"""How to write: the flags that choose a writer, and what else stands between the network and the text."""

from absl import flags

from diffusion_lm.build import LoadedModel
from diffusion_lm.inference import presets
from diffusion_lm.samplers.base import TextSampler
from diffusion_lm.samplers.cache_policy import DelayedCache, DualCache, PrefixCache
from diffusion_lm.samplers.drafters import MaskedDraft, PromptLookup, TiDARDraft
from diffusion_lm.samplers.logits_processors import (
    Chain,
    FrequencyPenalty,
    LogitsProcessor,
    NoRepeatNGram,
    SuppressTokens,
)
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Loop, Rescale
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import EntropyBound, Factor, FixedCount, Threshold

PACES = {  # of the confidence sampler, by the dial
    "confidence": lambda dial: FixedCount(),
    "margin": lambda dial: FixedCount(measure="margin"),
    "entropy": lambda dial: FixedCount(measure="entropy"),
    "threshold": lambda dial: Threshold() if dial is None else Threshold(least=dial),
    "factor": lambda dial: Factor() if dial is None else Factor(factor=dial),
    "entropy_bound": lambda dial: EntropyBound() if dial is None else EntropyBound(bound=dial),
}
REMASKS = {  # what takes tokens back, by the dial
    "remask_cap": lambda dial: Cap() if dial is None else Cap(eta=dial),
    "remask_rescale": lambda dial: Rescale() if dial is None else Rescale(eta=dial),
    "remask_confidence": lambda dial: ConfidenceBased(),
    "remask_loop": lambda dial: Loop() if dial is None else Loop(eta=dial),
}
CACHES = {
    "prefix": lambda refresh, block: PrefixCache(refresh=refresh, block_size=block),
    "dual": lambda refresh, block: DualCache(refresh=refresh, block_size=block),
    "delayed": lambda refresh, block: DelayedCache(refresh=refresh),
}
DRAFTERS = {  # of speculative
    "lookup": lambda mask: PromptLookup(),
    "canvas": lambda mask: MaskedDraft(mask=mask),
    "forked": lambda mask: TiDARDraft(),
}
TOKENWISE = ("autoregressive", "speculative")
FREE = ("threshold", "factor", "entropy_bound")  # take as many passes as they need
DIALED = (*FREE, "remask_cap", "remask_rescale", "remask_loop", "renoise", "embedding")
KINDS = [*PACES, "ancestral", *REMASKS, "renoise", "embedding", *TOKENWISE, "auto"]

SAMPLER = flags.DEFINE_enum("sampler", "confidence", KINDS, "How to write.")
DIAL = flags.DEFINE_float(
    "dial", None, "What threshold (0.9), factor (1), entropy_bound and renoise (0.1 nats), remask_* (share a pass, "
    "0.02) and embedding (1: as the diffusion draws, 0: by the flow's ODE) go by.",
)  # fmt: skip
CANVAS = flags.DEFINE_integer("canvas", 0, "Tokens cleared together; 0: as in training.")
PASSES = flags.DEFINE_integer("passes", None, "Most passes a canvas; none: 12, or what a dial takes.")
CORRECT = flags.DEFINE_integer("correct", 0, "So many of ancestral's --passes correct; for noise that isn't masks.")
ROUNDS = flags.DEFINE_integer("rounds", 0, "Rounds of second thoughts on each full canvas, a --span each.")
SPAN = flags.DEFINE_integer("span", 4, "Tokens that a round writes again.")
CACHE = flags.DEFINE_enum("cache", None, [*CACHES], "ApproximateCache passes, for networks that only read both ways.")
REFRESH = flags.DEFINE_integer("refresh", None, "With --cache: every so many passes read everything; none: they don't.")
BLOCK = flags.DEFINE_integer("block", None, "With --cache=prefix or dual: positions written together; none: 32.")
DRAFTS = flags.DEFINE_enum(
    "drafts", None, [*DRAFTERS], "What speculative guesses by: lookup (what followed the last time; if none is named), "
    "canvas (a pass of its own), forked (the pass that checks).",
)  # fmt: skip
PARTICLES = flags.DEFINE_integer("particles", 0, "With ancestral: so many texts at once, the better of which go on.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Keep so many of the likeliest tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the smallest set of tokens with this much probability.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Keep tokens with at least this share of the likeliest one's probability.")
GUIDANCE = flags.DEFINE_float("guidance", 0.0, "How much more than the network says the prompt counts.")
REPETITION = flags.DEFINE_float("repetition", 0.0, "Nats that a token costs for each time it stands in the text.")
NO_REPEAT = flags.DEFINE_integer("no_repeat", 0, "No run of so many tokens twice; 0: any.")
BAN = flags.DEFINE_multi_string("ban", [], "No piece that holds this text is written; may be given again.")


def check() -> None:
    """What can be said before anything is loaded. Raises ValueError."""
    kind = SAMPLER.value
    if PASSES.value is not None and PASSES.value < 1:
        raise ValueError(f"--passes must be at least 1, not {PASSES.value}")
    if DIAL.value is not None and kind not in DIALED:
        raise ValueError(f"--dial is for --sampler={', '.join(DIALED)}; {kind} goes by --passes")
    if CANVAS.value < 0:
        raise ValueError(f"--canvas must be at least 1 (or 0: as in training), not {CANVAS.value}")
    if DRAFTS.value and kind != "speculative":
        raise ValueError(f"--drafts is for --sampler=speculative, not {kind}")
    if ROUNDS.value and kind in (*TOKENWISE, "auto", "renoise", "embedding"):
        raise ValueError(f"--rounds go over canvases that were committed, {kind} has none: use another --sampler")
    if CORRECT.value and kind != "ancestral":
        raise ValueError(f"--correct is for --sampler=ancestral, not {kind}")
    if PARTICLES.value and (kind != "ancestral" or CORRECT.value or ROUNDS.value):
        raise ValueError("--particles is for --sampler=ancestral without --correct and --rounds")
    if CACHE.value and (kind not in PACES or ROUNDS.value):
        raise ValueError(f"--cache is for --sampler={', '.join(PACES)} without --rounds")
    if REFRESH.value is not None and not CACHE.value:
        raise ValueError("--refresh goes with --cache=prefix, dual or delayed")
    if BLOCK.value is not None and CACHE.value not in ("prefix", "dual"):
        raise ValueError("--block goes with --cache=prefix or dual")


def writer(model: LoadedModel, *, record: bool) -> TextSampler:
    """The writer that the flags ask for."""
    kind = SAMPLER.value
    kept = {"top_k": TOP_K.value, "top_p": TOP_P.value, "min_p": MIN_P.value}
    draw = SamplingParams(temperature=TEMPERATURE.value, suppressed=model.tokenizer.suppressed, **kept)
    if DRAFTS.value:
        return presets.speculative(model, draw=draw, drafter=DRAFTERS[DRAFTS.value](model.tokenizer.mask))
    if kind in TOKENWISE:
        return getattr(presets, kind)(model, draw=draw)
    passes = 12 if PASSES.value is None and kind not in FREE else PASSES.value
    plain = {"draw": draw, "canvas": CANVAS.value, "passes": passes}
    if kind == "auto":
        return presets.auto(model, **plain)
    if PARTICLES.value:
        return presets.population(model, particles=PARTICLES.value, **plain)
    written = _canvases(model, kind, plain | {"record": record})
    return presets.revised(model, written, rounds=ROUNDS.value, span=SPAN.value) if ROUNDS.value else written


def _canvases(model: LoadedModel, kind: str, rest: dict):
    if kind == "ancestral":
        return presets.ancestral(model, correct=CORRECT.value, **rest)
    if kind == "renoise":
        bound = {} if DIAL.value is None else {"pace": EntropyBound(bound=DIAL.value)}
        return presets.renoising(model, **bound, **rest)
    if kind == "embedding":
        return presets.embedding(model, **rest, **({} if DIAL.value is None else {"churn": DIAL.value}))
    if kind in REMASKS:
        return presets.remasking(model, remask=REMASKS[kind](DIAL.value), **rest)
    if CACHE.value:
        cache = CACHES[CACHE.value](REFRESH.value or 0, 32 if BLOCK.value is None else BLOCK.value)
        return presets.approximate(model, pace=PACES[kind](DIAL.value), cache=cache, **rest)
    return presets.confidence(model, pace=PACES[kind](DIAL.value), **rest)


def constraint(model: LoadedModel) -> LogitsProcessor | None:
    """The rules that the flags ask for; None: no rule. Raises ValueError where nothing could be written."""
    rules = []
    if BAN.value:
        pieces = model.tokenizer.pieces(range(model.tokenizer.vocab))
        banned = tuple(i for i, piece in enumerate(pieces) if any(text in piece for text in BAN.value))
        if len(banned) + len(model.tokenizer.suppressed) >= model.tokenizer.vocab - 1 or not all(BAN.value):
            raise ValueError(f"--ban={BAN.value} leaves nothing to write: ban less")
        rules.append(SuppressTokens(tokens=banned))
    rules += [FrequencyPenalty(nats=REPETITION.value)] if REPETITION.value else []
    rules += [NoRepeatNGram(size=NO_REPEAT.value)] if NO_REPEAT.value else []
    return Chain(tuple(rules)) if rules else None
