"""Each family's published sampler, made of our parts, with the names and defaults of the family's code: `PUBLISHED`."""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.build import LoadedModel
from diffusion_lm.inference import presets
from diffusion_lm.layouts import WholeRow
from diffusion_lm.models import (
    a2d_qwen3,
    bd3lm,
    diffusion_gemma,
    dream,
    fastdllm_v2,
    llada,
    llada2,
    lladamoe,
    md4,
    mdlm,
    sdar,
    sedd,
    tiny_diffusion,
)
from diffusion_lm.processes.base import Process
from diffusion_lm.processes.score import UnnormalizedScore
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import CanvasSampler, TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.editing import Editing
from diffusion_lm.samplers.first_hitting import FirstHitting
from diffusion_lm.samplers.renoising import Renoising
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import (
    ConstantCount,
    EntropyBound,
    EvenlyOverCanvas,
    FixedCount,
    OverTime,
    Threshold,
)

NO_EOS = -1  # their canvases go on after an end of text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A family's published sampler.

    make      (model, settings) -> the text sampler
    defaults  settings with their defaults, by the names of the family's code; generation_config.json may set them
    steps     the name of the steps among them: what `denoising_steps` sets
    canvas    the name of the block that is denoised together: what `canvas_length` sets; "": there is none
    groups    settings that generation_config.json holds together: their name there, and the class that it must name
    """

    make: Callable[[LoadedModel, Mapping[str, Any]], TextSampler]
    defaults: Mapping[str, Any]
    steps: str = ""
    canvas: str = ""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


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


def _diffusion_gemma(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """DiffusionGemma: renoising by an entropy bound (EB-Sampler, arXiv 2505.24857) while the temperature falls."""
    if settings["temperature"] != 1:
        raise ValueError("this model's published sampler has a temperature that falls: set t_max and t_min")
    sampler = Renoising(
        process=model.process,
        denoising_steps=settings["max_denoising_steps"],
        eos=NO_EOS,
        sampling=_sampling(settings),
        schedule=EntropyBound(bound=settings["entropy_bound"]),
        max_temperature=settings["t_max"],
        min_temperature=settings["t_min"],
        entropy_threshold=settings["confidence_threshold"],
        stability=settings["stability_threshold"],
        sharpened_conditioning=True,
    )
    return dataclasses.replace(presets.block_diffusion(model, sampler), whole=True)


# Log-linear noise keeps a thousandth of the text at time 1, and the grid of times ends before 0.
_LOG_LINEAR, _LAST_TIME = 0.999, 1e-5
_REMOVALS = {
    "ddpm_cache": "likeliest", "ddpm": "likeliest", "analytic": "sample", "euler": "sample",
}  # fmt: skip


def _in_steps(model: LoadedModel, settings: Mapping[str, Any], process: Process, *, predictors: str) -> BlockDiffusion:
    """A whole row in even steps of log-linear noise, and one that removes what noise is left."""
    predictor = settings["predictor"]
    if predictor not in predictors.split():
        raise ValueError(f"predictor={predictor!r} isn't implemented: it is {', '.join(predictors.split())}")
    sampler = Ancestral(
        process=process,
        denoising_steps=settings["steps"] + 1,
        eos=NO_EOS,
        sampling=_sampling(settings),
        begin=_LOG_LINEAR,
        end=_LOG_LINEAR * _LAST_TIME,
        noise_removal=_REMOVALS[predictor],
    )
    return presets.block_diffusion(model, sampler)


def _mdlm(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """MDLM (arXiv 2406.07524): the reverse process; ddpm_cache and ddpm are one law, and end with likeliest tokens."""
    return _in_steps(model, settings, model.process, predictors="ddpm_cache ddpm analytic")


def _sedd(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """SEDD (arXiv 2310.16834): the analytic step and Euler's, which are one law for its log-linear noise."""
    process = UnnormalizedScore(schedule=model.process.schedule, mask=model.process.mask)
    return _in_steps(model, settings, process, predictors="analytic euler")


def _md4(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """MD4 (arXiv 2406.04329): the reverse process, in steps that are even or the cosine of even ones."""
    grid = settings["sampling_grid"]
    if grid not in ("cosine", "uniform"):
        raise ValueError(f"sampling_grid={grid!r} isn't implemented: it is cosine or uniform")
    sampler = Ancestral(
        process=model.process,
        denoising_steps=settings["timesteps"],
        eos=NO_EOS,
        sampling=dataclasses.replace(_sampling(settings), top_p=settings["topp"]),
        cosine=grid == "cosine",
    )
    return presets.block_diffusion(model, sampler)


def _bd3lm(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """BD3-LM (arXiv 2503.09573, section 5.2): blocks over the exact cache, a token at a time at first hitting."""
    if settings["first_hitting"] is not True:
        raise ValueError(f"first_hitting={settings['first_hitting']!r} isn't implemented: it is true")
    size = _block_size(model, settings["block_size"])
    sampling = dataclasses.replace(_sampling(settings), top_p=settings["nucleus_p"])
    return _blocks(
        model, FirstHitting(process=model.process, denoising_steps=size, eos=NO_EOS, sampling=sampling), size
    )


def _tiny_diffusion(model: LoadedModel, settings: Mapping[str, Any]) -> BlockDiffusion:
    """tiny-diffusion: the likeliest tokens, those above a threshold or k of them in a step; steps are counted."""
    method, width = settings["method"], model.config.data.seq_len
    if method == "confidence":
        schedule = Threshold(threshold=settings["confidence_threshold"], least=ConstantCount())
    elif method == "topk":
        schedule = FixedCount(least=ConstantCount(count=settings["k"] or max(width // 10, 1)))
    else:
        raise ValueError(f"method={method!r} isn't implemented: it is confidence or topk")
    sampler = _confidence(settings, schedule, width)
    return presets.block_diffusion(model, dataclasses.replace(sampler, counted_times=model.config.model.learned_times))


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


CAUSAL = Published(make=_causal, defaults={})
_LLADA = Published(
    make=_llada, defaults={"temperature": 0.0, "steps": None, "block_length": 32, "threshold": None}, steps="steps"
)
PUBLISHED: dict[ModuleType, Published] = {
    a2d_qwen3: dataclasses.replace(_LLADA, make=_a2d),
    diffusion_gemma: Published(
        make=_diffusion_gemma,
        defaults={
            "max_denoising_steps": 48, "t_min": 0.4, "t_max": 0.8, "entropy_bound": 0.1, "stability_threshold": 1,
            "confidence_threshold": 0.005,
        },
        steps="max_denoising_steps",
        groups={"sampler_config": "EntropyBoundSamplerConfig"},
    ),
    bd3lm: Published(
        make=_bd3lm,
        defaults={"first_hitting": True, "nucleus_p": 1.0, "block_size": None},
        canvas="block_size",
    ),
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
    md4: Published(
        make=_md4,
        defaults={"sampling_grid": "cosine", "timesteps": 1000, "topp": 1.0},
        steps="timesteps",
    ),
    mdlm: Published(make=_mdlm, defaults={"predictor": "ddpm_cache", "steps": 128}, steps="steps"),
    sdar: Published(
        make=_sdar,
        defaults={
            "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.85, "denoising_steps": None,
            "block_length": None,
        },
        steps="denoising_steps",
        canvas="block_length",
    ),
    sedd: Published(make=_sedd, defaults={"predictor": "analytic", "steps": 1024}, steps="steps"),
    tiny_diffusion: Published(
        make=_tiny_diffusion,
        defaults={"method": "confidence", "confidence_threshold": 0.9, "k": None, "temperature": 0.0},
    ),
}  # fmt: skip
