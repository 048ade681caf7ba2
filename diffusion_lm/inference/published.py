"""How each family's own code samples: presets made of our parts, with the names and defaults of that code.

`PUBLISHED` is the one table. A setting is what the user gives, else what the checkpoint's generation_config.json says,
else the family's default. What that file asks for that isn't implemented is refused by name.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.build import LoadedModel
from diffusion_lm.convert.huggingface import parse_json
from diffusion_lm.inference import pipeline, presets
from diffusion_lm.layouts import WholeRow
from diffusion_lm.models import a2d_qwen3, dream, fastdllm_v2, llada, llada2, lladamoe, sdar
from diffusion_lm.models.family_index import family_of
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import CanvasSampler, TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.editing import Editing
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import EvenlyOverCanvas, FixedCount, OverTime, Threshold

DEFAULT_NEW_TOKENS = 256
NO_EOS = -1  # their canvases go on after an end of text
# What a generation_config.json may say that leaves the text as it is.
_NEUTRAL = {
    "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "diversity_penalty": 0.0, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "min_length": 0,
    "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0, "alg_temp": 0.0, "minimal_topk": 1, "remasking": "low_confidence",
}  # fmt: skip
_SAYS_NOTHING = {
    "transformers_version", "_from_model_config", "_commit_hash", "use_cache", "cache_implementation",
    "bos_token_id", "eos_token_id", "pad_token_id", "return_dict_in_generate",
}  # fmt: skip
_COMMON = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_new_tokens": None,
    "max_length": None, "cfg_scale": 0.0,
}  # fmt: skip


class Preset(NamedTuple):
    """A text sampler, and what else settings say.

    max_new_tokens, max_length  tokens at most, new ones or with the prompt; None: nothing is said
    cfg_scale                   guidance
    """

    sampler: TextSampler
    max_new_tokens: int | None = None
    max_length: int | None = None
    cfg_scale: float = 0.0

    def new_tokens(self, model: LoadedModel, prompts: Sequence) -> int:
        """How many tokens follow these prompts (see `pipeline.encode_prompts`), where the user doesn't say."""
        if self.max_new_tokens is not None or self.max_length is None:
            return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return self.max_length - max(len(row) for row in pipeline.encode_prompts(model, prompts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A family's published sampler.

    make      (model, settings) -> the text sampler
    defaults  settings with their defaults, by the names of the family's code; generation_config.json may set them
    steps     the name of the steps among them: what `denoising_steps` sets
    canvas    the name of the block that is denoised together: what `canvas_length` sets; "": there is none
    """

    make: Callable[[LoadedModel, Mapping[str, Any]], TextSampler]
    defaults: Mapping[str, Any]
    steps: str = ""
    canvas: str = ""


def preset(model: LoadedModel, **given: Any) -> Preset:
    """The published sampler of a converted model.

    Args:
      model: a converted model.
      given: settings by our names (temperature, top_k, top_p, min_p, cfg_scale, denoising_steps, canvas_length; record;
        suppressed, ids beside the tokenizer's own) or by the family's; None: not given.

    Raises ValueError for a model without one, for settings that it doesn't have, and for what its
    generation_config.json asks that isn't implemented.
    """
    found = of(model)
    if found is None:
        raise ValueError("only converted models have a published sampler: name one of ours")
    given = {name: value for name, value in given.items() if value is not None}
    record, suppressed = given.pop("record", False), given.pop("suppressed", ())
    for ours, theirs in (("denoising_steps", found.steps), ("canvas_length", found.canvas)):
        if value := given.pop(ours, 0):
            if not theirs:
                raise ValueError(f"this model's published sampler has no {ours}: leave it out, or name one of ours")
            given[theirs] = value
    settings = _COMMON | dict(found.defaults)
    if unknown := sorted(given.keys() - settings.keys()):
        known = ", ".join(sorted(settings))
        raise ValueError(f"this model's published sampler has no {unknown[0]}: it has {known}; or name one of ours")
    settings |= _from_file(model, settings) | given | {"suppressed": (*model.tokenizer.suppressed, *suppressed)}
    sampler = found.make(model, settings)
    if record:
        if not isinstance(sampler, BlockDiffusion):
            raise ValueError("only canvases can be recorded")
        sampler = dataclasses.replace(sampler, record=True)
    return Preset(sampler, settings["max_new_tokens"], settings["max_length"], settings["cfg_scale"])


def of(model: LoadedModel) -> Published | None:
    """The published sampler of the model's family; None for a network of our own."""
    source = model.meta.source if model.meta else None
    if not source:
        return None
    return PUBLISHED.get(family_of(source["config"], "the source"), None if _has_canvas(model) else _CAUSAL)


def _has_canvas(model: LoadedModel) -> bool:
    return model.config.objective.layout.denoises


def _from_file(model: LoadedModel, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the checkpoint's generation_config.json, by their names here."""
    text = model.meta.source["companions"].get("generation_config.json")
    if text is None:
        return {}
    found, settings = parse_json(text, "generation_config.json"), {}
    for key, value in found.items():
        if key in _SAYS_NOTHING or value is None or value is False or value == _NEUTRAL.get(key, known):
            continue
        if key in ("mask_token_id", "mask_id"):
            if value != model.tokenizer.mask:
                raise ValueError(f"generation_config.json sets {key}={value}, config.json {model.tokenizer.mask}")
        elif key in known or key == "gen_length":
            settings["max_new_tokens" if key == "gen_length" else key] = value
        elif key != "do_sample":
            raise ValueError(
                f"generation_config.json sets {key}={value!r}, which isn't implemented: name a sampler of ours, "
                "which leaves that file's settings out"
            )
    return settings | ({"temperature": 0.0} if found.get("do_sample") is False else {})


def _sampling(settings: Mapping[str, Any]) -> SamplingParams:
    return SamplingParams(**{name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p", "suppressed")})


def _causal(model: LoadedModel, settings: Mapping[str, Any]) -> AutoregressiveSampler:
    return presets.autoregressive(model, sampling=_sampling(settings))


def _whole(model: LoadedModel, sampler: CanvasSampler, steps: int | None) -> BlockDiffusion:
    """The prompt and the answer as one canvas; steps None: one for each new token."""
    blocks = presets.block_diffusion(model, sampler)
    return dataclasses.replace(blocks, fitted=True, steps_per_token=0.0 if steps else 1.0)


def _blocks(model: LoadedModel, sampler: CanvasSampler, size: int) -> BlockDiffusion:
    """Blocks over clean blocks, of another size than in training if asked for."""
    blocks = presets.block_diffusion(model, sampler)
    clean = BlockCausal(size) if isinstance(blocks.clean, BlockCausal) else blocks.clean
    return dataclasses.replace(
        blocks, canvas_length=size, clean=clean, align=size if blocks.align > 1 else blocks.align
    )


def _block_size(model: LoadedModel, setting: int | None) -> int:
    return setting or model.config.objective.layout.canvas_length(model.config.data.seq_len)


def _llada(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """LLaDA (arXiv 2502.09992, section 2.4): semi-autoregressive, low-confidence remasking."""
    threshold = settings["threshold"]
    sampler = Confidence(
        denoising_steps=settings["steps"] or 1,
        eos=NO_EOS,
        sampling=_sampling(settings),
        schedule=FixedCount() if threshold is None else Threshold(threshold=threshold),
        block_length=settings["block_length"],
    )
    return _whole(model, sampler, settings["steps"])


_DREAM_SCORES = {"entropy": "entropy", "topk_margin": "margin", "maskgit_plus": "probability"}


def _dream(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """Dream (arXiv 2508.15487): a grid of times says how many positions a step commits, `alg` which."""
    alg, steps = settings["alg"], settings["steps"]
    common = {"denoising_steps": steps or 1, "eos": NO_EOS, "sampling": _sampling(settings)}
    if alg == "origin":
        return _whole(model, Ancestral(process=model.process, end=settings["eps"], **common), steps)
    if alg not in _DREAM_SCORES:
        raise ValueError(f"alg={alg!r} isn't implemented: it is origin, {', '.join(_DREAM_SCORES)}")
    schedule = FixedCount(score=_DREAM_SCORES[alg], least=OverTime(end=settings["eps"]))
    return _whole(model, Confidence(schedule=schedule, filtered_score=True, **common), steps)


_SDAR_SCORES = {"low_confidence_static": "probability", "sequential": "position"}


def _sdar(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """SDAR (arXiv 2510.06303): blocks over an exact cache, by a threshold or a fixed number a step."""
    size, strategy = _block_size(model, settings["block_length"]), settings["remasking_strategy"]
    if strategy == "low_confidence_dynamic":
        schedule = Threshold(threshold=settings["confidence_threshold"], least=EvenlyOverCanvas())
    elif strategy in _SDAR_SCORES:
        schedule = FixedCount(score=_SDAR_SCORES[strategy], least=EvenlyOverCanvas())
    else:
        raise ValueError(
            f"remasking_strategy={strategy!r} isn't implemented: it is low_confidence_dynamic, "
            + ", ".join(_SDAR_SCORES)
        )
    steps = settings["denoising_steps"] or size
    return _blocks(model, _confidence(settings, schedule, steps), size)


def _llada2(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """LLaDA2.0 (arXiv 2512.15745): blocks by a threshold; LLaDA2.1 also edits tokens that stand."""
    size, editing = _block_size(model, settings["block_length"]), settings["editing_threshold"]
    if editing is None:
        schedule = Threshold(threshold=settings["threshold"], least=EvenlyOverCanvas())
        return _blocks(model, _confidence(settings, schedule, settings["steps"] or size), size)
    inner = _confidence(settings, Threshold(threshold=settings["threshold"]), size)
    sampler = Editing(sampler=inner, threshold=editing, max_editing_steps=settings["max_post_steps"])
    return _blocks(model, sampler, size)


def _fastdllm_v2(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """Fast-dLLM v2 (arXiv 2509.26328): a threshold in sub-blocks of a block; its first token is predicted alone."""
    size = _block_size(model, settings["block_size"])
    if not settings["temperature"]:
        settings = {**settings, "top_p": 1.0}  # theirs takes the likeliest token before it filters
    schedule = Threshold(threshold=settings["threshold"])
    sampler = dataclasses.replace(
        _confidence(settings, schedule, size + 1),
        block_length=settings["small_block_size"],
        block_origin="canvas",
        first_alone=True,
    )
    return _blocks(model, sampler, size)


def _confidence(settings: Mapping[str, Any], schedule: Any, steps: int) -> Confidence:
    sampling = _sampling(settings)
    return Confidence(denoising_steps=steps, eos=NO_EOS, sampling=sampling, schedule=schedule, filtered_score=True)


def _a2d(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """A2D-Qwen3 (github.com/ZHZisZZ/dllm): LLaDA's sampler on whole rows, evenly many a step in blocks."""
    if isinstance(model.config.objective.layout, WholeRow):
        return _llada(model, settings)
    size = _block_size(model, None)
    sampler = _confidence(settings, FixedCount(), settings["steps"] or size)
    return _blocks(model, dataclasses.replace(sampler, filtered_score=False), size)


_CAUSAL = Published(make=_causal, defaults={})
_LLADA = Published(
    make=_llada, defaults={"temperature": 0.0, "steps": None, "block_length": 32, "threshold": None}, steps="steps"
)
PUBLISHED: dict[ModuleType, Published] = {
    a2d_qwen3: dataclasses.replace(_LLADA, make=_a2d),
    dream: Published(
        make=_dream,
        defaults={"temperature": 0.2, "top_p": 0.95, "alg": "entropy", "steps": None, "eps": 1e-3},
        steps="steps",
    ),
    fastdllm_v2: Published(
        make=_fastdllm_v2,
        defaults={
            "temperature": 0.0, "top_p": 0.95, "threshold": 0.9, "small_block_size": 8, "block_size": None
        },
        canvas="block_size",
    ),
    llada: _LLADA,
    llada2: Published(
        make=_llada2,
        defaults={
            "temperature": 0.0, "threshold": 0.95, "steps": None, "block_length": None, "editing_threshold": None,
            "max_post_steps": 16,
        },
        steps="steps",
        canvas="block_length",
    ),
    lladamoe: _LLADA,
    sdar: Published(
        make=_sdar,
        defaults={
            "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.85, "denoising_steps": None,
            "block_length": None,
        },
        steps="denoising_steps",
        canvas="block_length",
    ),
}  # fmt: skip
