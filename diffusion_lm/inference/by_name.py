"""Samplers by name, by class or as they are, for a network."""

import dataclasses
from typing import Any

from diffusion_lm.build import LoadedModel
from diffusion_lm.inference import presets, published
from diffusion_lm.samplers.base import CanvasSampler, TextSampler
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Loop, Rescale
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import EntropyBound, Factor, FixedCount, Threshold

DEFAULT_STEPS = 12  # denoising steps a canvas
PUBLISHED = "published"  # the name of a converted model's own sampler
# name -> the preset, its options, and whether it takes as many steps as it needs
SAMPLERS = {
    "confidence": (presets.confidence, {"schedule": FixedCount()}, False),
    "threshold": (presets.confidence, {"schedule": Threshold()}, True),
    "factor": (presets.confidence, {"schedule": Factor()}, True),
    "entropy_bound": (presets.confidence, {"schedule": EntropyBound()}, True),
    "ancestral": (presets.ancestral, {}, False),
    "reverse_process": (presets.reverse_process, {}, False),
    "remask_cap": (presets.remasking, {"remask": Cap()}, False),
    "remask_rescale": (presets.remasking, {"remask": Rescale()}, False),
    "remask_confidence": (presets.remasking, {"remask": ConfidenceBased()}, False),
    "remask_loop": (presets.remasking, {"remask": Loop()}, False),
    "renoise": (presets.renoising, {}, False),
    "embedding_flow": (presets.embedding_flow, {}, False),
    "autoregressive": (presets.autoregressive, {}, None),
    "speculative": (presets.speculative, {}, None),
    "auto": (presets.auto, {}, False),
}


def default_name(model: LoadedModel, *, own: bool = True) -> str:
    """The sampler that is used where nobody names one, a name in SAMPLERS or PUBLISHED: "published" for converted
    models (own=False: as for others); "autoregressive" for networks without canvases, "confidence" for masks,
    "reverse_process" for other noise."""
    if own and published.of(model):
        return PUBLISHED
    name = presets.fitting(model)
    return name if name in ("autoregressive", "confidence") else "reverse_process"


def made_for(model: LoadedModel, sampler: Any, drawn: dict, **options) -> published.Preset:
    """The sampler, by `published` or by `make_sampler`; drawn: fields of SamplingParams, None where not given."""
    drawn = {name: value for name, value in drawn.items() if value is not None}
    sampler = default_name(model) if sampler is None else sampler
    if sampler == PUBLISHED:
        return published.preset(model, **drawn, **options)
    sampling = SamplingParams(**drawn, suppressed=model.tokenizer.suppressed)
    return published.Preset(make_sampler(model, sampler, sampling=sampling, **options))


def make_sampler(
    model: LoadedModel,
    sampler: Any = None,
    *,
    sampling: SamplingParams | None = None,
    denoising_steps: int | None = None,
    canvas_length: int = 0,
    record: bool = False,
    **options,
) -> TextSampler:
    """The text sampler for a network.

    Args:
      model: a trained network.
      sampler: a name in SAMPLERS, or "published"; a canvas or text sampler's class, or an instance of one. A class
        gets those of the fields process, denoising_steps, eos, mask and sampling that it has, and `options`. None: see
        `default_name`.
      sampling: how tokens are sampled; None: at temperature 1, or as the published sampler does.
      denoising_steps, canvas_length, options: as in `generate`.
      record: keep each step's canvas, for `visualize`.

    Raises ValueError if sampler, options and network don't go together.
    """
    tokenizer, layout = model.tokenizer, model.config.objective.layout
    sampler = default_name(model) if sampler is None else sampler
    if sampler == PUBLISHED:
        drawn = {n: getattr(sampling, n) for n in ("temperature", "top_k", "top_p", "min_p")} if sampling else {}
        shape = {"denoising_steps": denoising_steps, "canvas_length": canvas_length}
        return published.preset(model, record=record, **shape, **drawn, **options).sampler
    sampling = sampling or SamplingParams(suppressed=tokenizer.suppressed)
    if isinstance(sampler, str):
        options |= {"record": True} if record else {}
        return _named(model, sampler, options, sampling, denoising_steps, canvas_length)
    if isinstance(sampler, type):
        known = {
            "process": model.process,
            "denoising_steps": denoising_steps or DEFAULT_STEPS,
            "eos": tokenizer.eos if layout.closed_by_eos or hasattr(sampler, "stages") else -1,
            "mask": tokenizer.mask,
            "sampling": sampling,
        }
        has = [field.name for field in dataclasses.fields(sampler)] if dataclasses.is_dataclass(sampler) else []
        if has and (unknown := sorted(options.keys() - set(has))):
            raise ValueError(f"{sampler.__name__} has no field {unknown[0]}: its fields are {', '.join(has)}")
        sampler = _call(sampler, {name: value for name, value in known.items() if name in has} | options)
    elif options or denoising_steps is not None:
        names = ", ".join([*options, *(["denoising_steps"] if denoising_steps is not None else [])])
        raise ValueError(f"{names}: set them in the sampler that you pass")
    kind = type(sampler)
    if hasattr(sampler, "stages"):
        if record:
            raise ValueError(f"{kind.__name__} has no canvas whose steps could be shown")
        return sampler
    if not hasattr(sampler, "query"):
        raise ValueError(f"{kind.__name__} is no sampler: it has neither query and update, nor stages")
    lacks = [name for name in ("query", "update") if getattr(kind, name, None) in (None, getattr(CanvasSampler, name))]
    lacks += [name for name in ("init", "done", "uses_embeddings", "denoising_steps") if not hasattr(sampler, name)]
    if lacks:
        raise ValueError(f"{kind.__name__} is no sampler: it lacks {', '.join(lacks)}: derive it from CanvasSampler")
    return presets.block_diffusion(model, sampler, canvas_length=canvas_length, record=record)


def _named(model, name: str, options: dict, sampling, denoising_steps: int | None, canvas_length: int) -> TextSampler:
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is none of {PUBLISHED}, {', '.join(SAMPLERS)}: or pass a class")
    preset, fixed, free = SAMPLERS[name]
    shape = {}
    if free is not None:
        steps = denoising_steps if denoising_steps is not None or free else DEFAULT_STEPS
        shape = {"denoising_steps": steps, "canvas_length": canvas_length}
    elif denoising_steps is not None or canvas_length:
        raise ValueError(f"sampler {name!r} has no canvas: leave denoising_steps and canvas_length out")
    return _call(preset, fixed | shape | options | {"sampling": sampling}, model)


def _call(make: Any, options: dict, *arguments: Any) -> Any:
    try:
        return make(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"{make.__name__}: {error}") from None
