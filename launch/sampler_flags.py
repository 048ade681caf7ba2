"""The flags that choose how text is sampled, and the text sampler that they describe.

`SAMPLERS` is the one table of names: what each does, which flags it takes, and how it is made.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable

from diffusion_lm.build import LoadedModel
from diffusion_lm.config import find_class
from diffusion_lm.data.tokenizer import token_texts
from diffusion_lm.inference import by_name, presets, published
from diffusion_lm.samplers.base import TextSampler
from diffusion_lm.samplers.cache_policy import DelayedCache, DualCache, PrefixCache
from diffusion_lm.samplers.drafters import MaskedDraft, PromptLookup, TiDARDraft, TrainedDraft
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
from launch import command
from launch.flags import Flags

STEPS = 12  # denoising steps a canvas of the samplers whose cost is fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One name of --sampler.

    help   what the sampler does
    make   (model, options) -> the text sampler; options are the preset's arguments that canvas samplers share
    flags  names of the flags that this sampler takes beside those that all take
    """

    help: str
    make: Callable[[LoadedModel, dict], TextSampler]
    flags: tuple[str, ...] = ()

    @property
    def records(self) -> bool:
        """Whether --view can show its steps."""
        return self.flags != _CANVAS and "canvas_length" in self.flags


def _confidence(schedule: Callable) -> Callable:
    """A maker of the confidence sampler, over an approximate cache if one is asked for."""

    def make(model: LoadedModel, options: dict) -> TextSampler:
        if not APPROXIMATE_CACHE.value:
            return presets.confidence(model, schedule=schedule(), **options)
        return presets.approximate_cache(
            model, schedule=schedule(), policy=CACHES[APPROXIMATE_CACHE.value](), **options
        )

    return make


def _remasking(schedule: Callable) -> Callable:
    return lambda model, options: presets.remasking(model, remask=schedule(), **options)


def _ancestral(model: LoadedModel, options: dict) -> TextSampler:
    if NUM_PARTICLES.value:
        options = {name: value for name, value in options.items() if name != "record"}
        return presets.particles(model, num_particles=NUM_PARTICLES.value, **options)
    return presets.ancestral(model, corrector_steps=CORRECTOR_STEPS.value, **options)


def _of_class(model: LoadedModel, options: dict) -> TextSampler:
    """The sampler of a class that --sampler names, which allows its import, with the flags that are set."""
    allowed = (*command.ALLOW_IMPORT.value, SAMPLER.value.partition(":")[0])
    cls, settings = find_class(SAMPLER.value, allowed, "--sampler"), _settings(options)
    return by_name.make_sampler(model, cls, **options, **settings)


def _published(model: LoadedModel, options: dict) -> published.Preset:
    """A converted model's own sampler, with the flags that are set."""
    shape = {"denoising_steps": DENOISING_STEPS.value, "canvas_length": CANVAS_LENGTH.value}
    settings = _settings(options | shape)
    ended = (model.tokenizer.eos,) if IGNORE_EOS.value else ()
    shape |= {"record": options["record"], "suppressed": ended, "cfg_scale": CFG_SCALE.value}
    return published.preset(model, **_drawn(), **shape, **settings)


def _settings(taken: dict) -> dict:
    """What --sampler_setting sets; none of it has a flag of its own."""
    settings = {}
    for item in SAMPLER_SETTING.value:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise ValueError(f"--sampler_setting={item} is no NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value  # a word
    if clash := sorted(settings.keys() & taken.keys()):
        raise ValueError(f"--sampler_setting={clash[0]}=... has a flag of its own: set --{clash[0]}")
    return settings


def _drawn() -> dict:
    """The flags of `SamplingParams` that are set."""
    flags = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P}
    return {name: flag.value for name, flag in flags.items() if flag.value is not None}


def _given(flag, keyword: str) -> dict:
    """{keyword: the flag's value}, empty if the flag isn't set: the class then uses its own default."""
    return {} if flag.value is None else {keyword: flag.value}


_CANVAS = ("denoising_steps", "canvas_length")
_COMMITS = (*_CANVAS, "revise_rounds", "revise_span")
_CACHED = (*_COMMITS, "approximate_cache", "cache_block_size", "cache_refresh_every")
SAMPLERS = {
    "published": Kind(
        help="a converted model's own sampler, with its generation_config.json (docs/open_weights.md)",
        make=lambda model, options: _published(model, options).sampler,
        flags=(*_CANVAS, "sampler_setting"),
    ),
    "confidence": Kind(
        help="commits the same number of tokens each step, by --score (MaskGIT, LLaDA)",
        make=_confidence(lambda: FixedCount(score=SCORE.value)),
        flags=(*_CACHED, "score"),
    ),
    "threshold": Kind(
        help="commits every token whose probability exceeds --threshold (Fast-dLLM)",
        make=_confidence(lambda: Threshold(**_given(THRESHOLD, "threshold"))),
        flags=(*_CACHED, "threshold"),
    ),
    "factor": Kind(
        help="commits the most probable n tokens while (n + 1) (1 - p_n) < --factor (Fast-dLLM)",
        make=_confidence(lambda: Factor(**_given(FACTOR, "factor"))),
        flags=(*_CACHED, "factor"),
    ),
    "entropy_bound": Kind(
        help="commits the lowest-entropy tokens while their entropies sum to at most --entropy_bound (EB-Sampler)",
        make=_confidence(lambda: EntropyBound(**_given(ENTROPY_BOUND, "bound"))),
        flags=(*_CACHED, "entropy_bound"),
    ),
    "ancestral": Kind(
        help="follows the reverse process, for every noise on tokens (D3PM, MDLM, SEDD, UDLM, GIDD)",
        make=_ancestral,
        flags=(*_COMMITS, "corrector_steps", "num_particles"),
    ),
    "remask_cap": Kind(
        help="ancestral, and remasks committed tokens with probability at most --eta a step (ReMDM-cap)",
        make=_remasking(lambda: Cap(**_given(ETA, "eta"))),
        flags=(*_COMMITS, "eta"),
    ),
    "remask_rescale": Kind(
        help="ancestral, and remasks with --eta times the largest possible probability (ReMDM-rescale)",
        make=_remasking(lambda: Rescale(**_given(ETA, "eta"))),
        flags=(*_COMMITS, "eta"),
    ),
    "remask_confidence": Kind(
        help="ancestral, and remasks tokens that were committed with low probability (ReMDM-conf)",
        make=_remasking(ConfidenceBased),
        flags=_COMMITS,
    ),
    "remask_loop": Kind(
        help="ancestral, with a phase in the middle that remasks with probability --eta a step (ReMDM-loop)",
        make=_remasking(lambda: Loop(**_given(ETA, "eta"))),
        flags=(*_COMMITS, "eta"),
    ),
    "renoise": Kind(
        help="for uniform noise: keeps low-entropy tokens up to --entropy_bound, renoises the rest (DiffusionGemma)",
        make=lambda model, options: presets.renoising(
            model, schedule=EntropyBound(**_given(ENTROPY_BOUND, "bound")), **options
        ),
        flags=(*_CANVAS, "entropy_bound"),
    ),
    "embedding_flow": Kind(
        help="for Gaussian noise on embeddings: integrates the flow, with --churn of fresh noise",
        make=lambda model, options: presets.embedding_flow(model, **options, **_given(CHURN, "churn")),
        flags=(*_CANVAS, "churn"),
    ),
    "autoregressive": Kind(
        help="samples one token a forward pass, from left to right",
        make=lambda model, options: presets.autoregressive(model, sampling=options["sampling"]),
    ),
    "speculative": Kind(
        help="autoregressive text from drafts of --drafter that are verified in one pass",
        make=lambda model, options: presets.speculative(
            model,
            sampling=options["sampling"],
            drafter=DRAFTER.value and DRAFTERS[DRAFTER.value](model),
        ),
        flags=("drafter",),
    ),
    "auto": Kind(
        help="the faster of confidence and speculative, measured on this machine at each start",
        make=lambda model, options: presets.auto(
            model, **{name: value for name, value in options.items() if name != "record"}
        ),
        flags=_CANVAS,
    ),
}  # fmt: skip
FREE = ("threshold", "factor", "entropy_bound")  # take as many steps as they need, unless --denoising_steps bounds them
CACHES = {
    "prefix": lambda: PrefixCache(refresh_every=CACHE_REFRESH_EVERY.value, block_size=CACHE_BLOCK_SIZE.value),
    "dual": lambda: DualCache(refresh_every=CACHE_REFRESH_EVERY.value, block_size=CACHE_BLOCK_SIZE.value),
    "delayed": lambda: DelayedCache(refresh_every=CACHE_REFRESH_EVERY.value),
}
DRAFTERS = {
    "lookup": lambda model: PromptLookup(),
    "masked": lambda model: MaskedDraft(mask=model.tokenizer.mask),
    "trained": lambda model: TrainedDraft(num_tokens=model.config.objective.draft_length + 1),
    "tidar": lambda model: (
        TiDARDraft(num_tokens=n, causal=True) if (n := model.config.objective.draft_length) else TiDARDraft()
    ),
}

FLAGS = Flags()
SAMPLER = FLAGS.string(
    "sampler",
    None,
    "How text is sampled; or module:Class, a sampler of your own. Default: published for a converted model, else "
    "what the network was trained for: confidence (masks), autoregressive (no canvas), embedding_flow (embeddings) or "
    "ancestral. " + "; ".join(f"{name}: {its.help}" for name, its in SAMPLERS.items()),
)
DENOISING_STEPS = FLAGS.integer(
    "denoising_steps", None, "Most forward passes a canvas, at least 1. (LLaDA's `steps` are for all canvases of an "
    f"answer.) Default: {STEPS}; of threshold, factor and entropy_bound: as many as they need.", 1,
)  # fmt: skip
CANVAS_LENGTH = FLAGS.integer(
    "canvas_length", 0, "Tokens that are denoised together, at least 1; 0: as many as in training.", 0
)
SAMPLER_SETTING = FLAGS.multi_string(
    "sampler_setting", [], "NAME=VALUE, a setting of the published sampler by its own name, as in alg=maskgit_plus, or "
    "a field of a sampler of your own; may be repeated.",
)  # fmt: skip
SCORE = FLAGS.enum(
    "score", "probability", ["probability", "margin", "entropy"], "What confidence ranks positions by: the sampled "
    "token's probability; margin: the most probable token's less the second's; entropy: least entropy first.",
)  # fmt: skip
THRESHOLD = FLAGS.float("threshold", None, "Probability above which threshold commits, 0 to 1. Default: 0.9.", 0, 1)
FACTOR = FLAGS.float(
    "factor", None, "Bound of (n + 1) (1 - p_n), above 0; larger commits more tokens a step. Default: 1.", 0
)
ENTROPY_BOUND = FLAGS.float(
    "entropy_bound", None, "Entropy committed a step, in nats, at least 0; larger commits more. Default: 0.1.", 0
)
ETA = FLAGS.float(
    "eta", None, "Remasking probability a step (remask_rescale: share of the largest), 0 to 1. Default: 0.02.", 0, 1
)
CHURN = FLAGS.float(
    "churn", None, "Share of fresh noise of embedding_flow, 0 to 1. 0: the flow's ODE; 1: the posterior. Default: 1.",
    0, 1,
)  # fmt: skip
CORRECTOR_STEPS = FLAGS.integer(
    "corrector_steps", 0, "How many of ancestral's --denoising_steps correct at fixed noise; not for masks.", 0
)
REVISE_ROUNDS = FLAGS.integer(
    "revise_rounds", 0, "Times that the least probable span of a finished canvas is masked and sampled again.", 0
)
REVISE_SPAN = FLAGS.integer("revise_span", 4, "Tokens of that span, at least 1.", 1)
APPROXIMATE_CACHE = FLAGS.enum(
    "approximate_cache", None, [*CACHES], "Reuses stale keys and values, for networks without an exact cache. prefix: "
    "recomputes the current block and what follows; dual: the current block only; delayed: undecided and just decided "
    "positions. Default: none.",
)  # fmt: skip
CACHE_REFRESH_EVERY = FLAGS.integer(
    "cache_refresh_every", 0, "Steps between full recomputations of an approximate cache; 1: exact; 0: none.", 0
)
CACHE_BLOCK_SIZE = FLAGS.integer("cache_block_size", 32, "Positions a block of --approximate_cache=prefix or dual.", 1)
DRAFTER = FLAGS.enum(
    "drafter", None, [*DRAFTERS], "What speculative drafts with. lookup: earlier n-grams of the text, no extra pass; "
    "masked: one pass over masks; trained: one pass over the masks that objective=Drafting trains, both where the text "
    "doesn't repeat itself; tidar: masks in the pass that verifies (TiDAR). Default: lookup; of a network trained to "
    "draft trained or tidar, with as many masks as is fastest here, if half of a draft makes up for its time.",
)  # fmt: skip
NUM_PARTICLES = FLAGS.integer(
    "num_particles", 0, "Samples a prompt that ancestral reweights by the autoregressive likelihood and resamples "
    "after each canvas (sequential Monte Carlo; exact as their number grows). 0: off.", 0,
)  # fmt: skip
TEMPERATURE = FLAGS.float(
    "temperature", None, "Divides the logits, at least 0; 0: the most probable token. Default: 1, or the published "
    "sampler's; so are the next three.", 0,
)  # fmt: skip
TOP_K = FLAGS.integer("top_k", None, "Samples among the k most probable tokens; 0: all. Default: 0.", 0)
TOP_P = FLAGS.float(
    "top_p", None, "Samples among the smallest set of tokens with this probability, 0 to 1. Default: 1.", 0, 1
)
MIN_P = FLAGS.float(
    "min_p", None, "Drops tokens below this share of the top token's probability, 0 to 1. Default: 0.", 0, 1
)
CFG_SCALE = FLAGS.float(
    "cfg_scale", None, "Classifier-free guidance scale s, at least 0: logits (1 + s) conditional - s unconditional. "
    "0: off; above 0 each pass costs two. Default: 0, or the published sampler's.", 0,
)  # fmt: skip
FREQUENCY_PENALTY = FLAGS.float(
    "frequency_penalty", 0.0, "Subtracted from a token's logit for each time it is already in the text, in nats."
)
NO_REPEAT_NGRAM_SIZE = FLAGS.integer("no_repeat_ngram_size", 0, "No n-gram of this size occurs twice; 0: any may.", 0)
BAD_WORDS = FLAGS.multi_string("bad_words", [], "No token that contains this text is sampled; may be repeated.")
IGNORE_EOS = FLAGS.bool("ignore_eos", False, "Never samples the end of text: every answer has --max_new_tokens tokens.")


_DEFAULTS = ("confidence", "published", "autoregressive", "embedding_flow", "ancestral")  # see `name`


def name(model: LoadedModel) -> str:
    """The name of the sampler for a model: what --sampler says, else what it was published with or trained for."""
    if SAMPLER.value:
        return SAMPLER.value
    chosen = by_name.default_name(model)
    return presets.fitting(model) if chosen == "reverse_process" else chosen


def kind(chosen: str) -> Kind:
    """A sampler's line of the table, or one for a class. Raises ValueError for any other name."""
    if ":" in chosen:
        return Kind(help="a sampler class", make=_of_class, flags=(*_CANVAS, "sampler_setting"))
    if chosen not in SAMPLERS:
        near = difflib.get_close_matches(chosen, SAMPLERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--sampler={chosen}: {hint}It is one of {', '.join(SAMPLERS)}, or module:Class")
    return SAMPLERS[chosen]


def _check_applies(*chosen: str) -> None:
    """Raises ValueError for a flag that is set and that none of the chosen samplers takes."""
    taken = {flag for one in chosen for flag in kind(one).flags}
    for name in sorted({name for other in SAMPLERS.values() for name in other.flags} - taken):
        flag = FLAGS.values[name]
        if flag.value != flag.default:
            takers = ", ".join(other for other, its in SAMPLERS.items() if name in its.flags)
            raise ValueError(f"--{name} applies to --sampler={takers}; not to {chosen[0]}")


def check() -> None:
    """Raises ValueError for flags that contradict each other; needs no model."""
    _check_applies(*([SAMPLER.value] if SAMPLER.value else _DEFAULTS))
    if NUM_PARTICLES.value and (CORRECTOR_STEPS.value or REVISE_ROUNDS.value):
        raise ValueError("--num_particles goes without --corrector_steps and --revise_rounds")
    if APPROXIMATE_CACHE.value and REVISE_ROUNDS.value:
        raise ValueError("--approximate_cache goes without --revise_rounds")
    if REVISE_SPAN.value != 4 and not REVISE_ROUNDS.value:
        raise ValueError("--revise_span goes with --revise_rounds")
    if CACHE_REFRESH_EVERY.value and not APPROXIMATE_CACHE.value:
        raise ValueError("--cache_refresh_every goes with --approximate_cache")
    if CACHE_BLOCK_SIZE.value != 32 and APPROXIMATE_CACHE.value not in ("prefix", "dual"):
        raise ValueError("--cache_block_size goes with --approximate_cache=prefix or dual")


def text_sampler(model: LoadedModel, *, record: bool) -> TextSampler:
    """The sampler that the flags describe; `record` keeps every step for --view. Raises ValueError if it doesn't fit
    the model."""
    return preset(model, record=record).sampler


def preset(model: LoadedModel, *, record: bool) -> published.Preset:
    """As `text_sampler`, with what else a published sampler's settings say."""
    chosen = name(model)
    _check_applies(chosen)
    if record and not kind(chosen).records:
        raise ValueError(f"--view shows the steps of canvas samplers, and this model's default is {chosen}")
    draw = SamplingParams(
        **_drawn(), suppressed=(*model.tokenizer.suppressed, *([model.tokenizer.eos] if IGNORE_EOS.value else []))
    )
    steps = DENOISING_STEPS.value or (None if chosen in FREE else STEPS)
    options = {"sampling": draw, "canvas_length": CANVAS_LENGTH.value, "denoising_steps": steps, "record": record}
    if chosen == "published":
        return _published(model, options)
    sampler = kind(chosen).make(model, options)
    if REVISE_ROUNDS.value:
        sampler = presets.revised(model, sampler, rounds=REVISE_ROUNDS.value, span=REVISE_SPAN.value)
    return published.Preset(sampler, cfg_scale=CFG_SCALE.value or 0.0)


def logits_processor(model: LoadedModel) -> LogitsProcessor | None:
    """The processors that the flags describe. Raises ValueError if --bad_words leaves no token."""
    rules = []
    if BAD_WORDS.value:
        texts = token_texts(model.tokenizer)
        banned = tuple(i for i, text in enumerate(texts) if any(word in text for word in BAD_WORDS.value))
        if len(banned) + len(model.tokenizer.suppressed) >= model.tokenizer.vocab - 1 or not all(BAD_WORDS.value):
            raise ValueError(f"--bad_words={BAD_WORDS.value} leaves no token to sample")
        rules.append(SuppressTokens(tokens=banned))
    rules += [FrequencyPenalty(nats=FREQUENCY_PENALTY.value)] if FREQUENCY_PENALTY.value else []
    rules += [NoRepeatNGram(size=NO_REPEAT_NGRAM_SIZE.value)] if NO_REPEAT_NGRAM_SIZE.value else []
    return Chain(tuple(rules)) if rules else None
