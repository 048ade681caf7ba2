"""The writer that fits a trained network, one function a way of writing; and `write`, which hands it prompts."""

import dataclasses
from typing import Any

from diffusion_lm.build import LoadedModel
from diffusion_lm.inference import autotune
from diffusion_lm.inference.pipeline import GenerationOutput, infill, trace, write
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.approximate_cache import ApproximateCache
from diffusion_lm.samplers.auto import Auto
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.cache_policy import CachePolicy, DualCache
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.drafters import Drafter, PromptLookup
from diffusion_lm.samplers.embedding_flow import EmbeddingFlowSampler
from diffusion_lm.samplers.particles import ParticleSampler
from diffusion_lm.samplers.remasking import Cap, Remasking, RemaskingSchedule
from diffusion_lm.samplers.renoising import Renoising
from diffusion_lm.samplers.revision import Revision
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.self_conditioning import SelfConditionedSampler
from diffusion_lm.samplers.speculative import Speculative
from diffusion_lm.samplers.unmasking import FixedCount, UnmaskingSchedule

__all__ = [
    "GenerationOutput", "ancestral", "approximate", "auto", "autoregressive", "confidence", "embedding", "infill", "population",
    "remasking", "renoising", "reverse", "revised", "speculative", "trace", "write",
]  # fmt: skip
MOST_PASSES = 100_000
EVEN = FixedCount()
CAP = Cap()
DUAL = DualCache()


def autoregressive(model: LoadedModel, *, draw: SamplingParams) -> AutoregressiveSampler:
    """The writer of one token a pass. Raises ValueError if the network didn't learn to write so."""
    objective = model.config.objective
    if not objective.trains_ar:
        raise ValueError(
            f"{type(objective).__name__} doesn't train the causal reading: sample with confidence or ancestral"
        )
    return AutoregressiveSampler(mask=model.tokenizer.mask, eos=model.tokenizer.eos, draw=draw)


def speculative(
    model: LoadedModel, *, draw: SamplingParams, drafter: Drafter | None = None, break_even: float | None = None
) -> Speculative:
    """The writer that guesses and checks: the autoregressive text, sooner where guesses (by default: what followed the
    last time) are good. break_even: see `Speculative`; None: measured here, which compiles two programs.

    Raises ValueError if the network didn't learn to write token by token, or to clear the masks that it guesses by.
    """
    plain, drafter = autoregressive(model, draw=draw), drafter or PromptLookup()
    masks = isinstance(model.process, Absorbing) and model.config.objective.layout.denoises
    if (drafter.passes or drafter.masks) and not masks:
        raise ValueError(
            f"{type(drafter).__name__} guesses by canvases of masks, which this network didn't learn: use PromptLookup"
        )
    drafts = Speculative(drafter=drafter, mask=plain.mask, eos=plain.eos, draw=draw)
    return dataclasses.replace(
        drafts, break_even=autotune.break_even(model, plain, drafts) if break_even is None else break_even
    )


def auto(model: LoadedModel, *, draw: SamplingParams, canvas: int, passes: int) -> Auto:
    """The writer that takes the faster of canvases (in so many passes) and token by token, by costs measured here:
    which it takes, and so its text, depends on the machine."""
    plain, canvases = autoregressive(model, draw=draw), confidence(model, draw=draw, canvas=canvas, passes=passes)
    tail = speculative(model, draw=draw)
    return Auto(canvases=canvases, tail=tail, costs=autotune.measured(model, plain, canvases))


def confidence(
    model: LoadedModel,
    *,
    draw: SamplingParams,
    canvas: int,
    passes: int | None = None,
    pace: UnmaskingSchedule = EVEN,
    record: bool = False,
) -> BlockDiffusion:
    """The writer of canvases that commits the surest positions first, as many a pass as `pace` says.

    passes None: as many as it takes. Raises ValueError where noise is no mask.
    """
    if not isinstance(model.process, Absorbing):
        raise ValueError(
            f"confidence fills in masks, {type(model.process).__name__} has other noise: use ancestral or embedding"
        )
    passes = _width(model, canvas) if passes is None else passes
    sampler = Confidence(passes=passes, eos=_closing(model), draw=draw, pace=pace)
    return _canvases(model, sampler, canvas, record)


def approximate(
    model: LoadedModel,
    *,
    draw: SamplingParams,
    canvas: int,
    passes: int | None = None,
    pace: UnmaskingSchedule = EVEN,
    cache: CachePolicy = DUAL,
    record: bool = False,
) -> ApproximateCache:
    """`confidence` over an approximate cache, for a network that reads whole rows both ways: a pass reads what `cache`
    asks for again, and sees the rest as it was. docs/caches.md has what that saves and costs.

    Raises ValueError where noise is no mask, or the network has an exact cache.
    """
    if model.config.model.self_conditioning:
        raise ValueError("approximate caches feed back no soft prediction: leave the cache out")
    exact = confidence(model, draw=draw, canvas=canvas, passes=passes, pace=pace, record=record)
    if exact.align:
        raise ValueError(f"{type(model.config.objective).__name__} has an exact cache: leave the approximate one out")
    return ApproximateCache(
        policy=cache, **{field.name: getattr(exact, field.name) for field in dataclasses.fields(exact)}
    )


def ancestral(
    model: LoadedModel, *, draw: SamplingParams, canvas: int, passes: int, correct: int = 0, record: bool = False
) -> BlockDiffusion:
    """The writer of canvases that follows the reverse process; the last `correct` of its passes correct."""
    sampler = Ancestral(process=model.process, passes=passes, eos=_closing(model), draw=draw, correct=correct)
    return _canvases(model, sampler, canvas, record)


def embedding(
    model: LoadedModel, *, draw: SamplingParams, canvas: int, passes: int, churn: float = 1.0, record: bool = False
) -> BlockDiffusion:
    """The writer of canvases that takes noise off vectors; churn 0: by the flow's ODE, 1: by the diffusion's posterior.
    Raises ValueError where noise lies on tokens."""
    sampler = EmbeddingFlowSampler(process=model.process, passes=passes, eos=_closing(model), draw=draw, churn=churn)
    return _canvases(model, sampler, canvas, record)


def reverse(model: LoadedModel, *, draw: SamplingParams, canvas: int, passes: int) -> BlockDiffusion:
    """The writer of canvases that undoes the noise as the process has it, whatever it lies on; a student of a flow
    by the ODE that it was taught."""
    if not isinstance(model.process, Gaussian):
        return ancestral(model, draw=draw, canvas=canvas, passes=passes)
    churn = 0.0 if isinstance(model.config.objective, Distillation) else 1.0
    return embedding(model, draw=draw, canvas=canvas, passes=passes, churn=churn)


def remasking(
    model: LoadedModel,
    *,
    draw: SamplingParams,
    canvas: int,
    passes: int,
    remask: RemaskingSchedule = CAP,
    record: bool = False,
) -> BlockDiffusion:
    """The writer of canvases that takes tokens back as `remask` says. Raises ValueError where noise is no mask."""
    sampler = Remasking(process=model.process, passes=passes, eos=_closing(model), draw=draw, remask=remask)
    return _canvases(model, sampler, canvas, record)


def renoising(
    model: LoadedModel, *, draw: SamplingParams, canvas: int, passes: int, record: bool = False, **options
) -> BlockDiffusion:
    """The writer of canvases that keeps what may be drawn together and renoises the rest, until the canvas stands
    still (see `Renoising` for options). Raises ValueError where noise is masks."""
    sampler = Renoising(process=model.process, passes=passes, eos=_closing(model), draw=draw, **options)
    return _canvases(model, sampler, canvas, record)


def population(
    model: LoadedModel, *, draw: SamplingParams, canvas: int, passes: int, particles: int
) -> ParticleSampler:
    """The writer of `particles` texts at once, the better of which go on (see `ParticleSampler`): give it each prompt so
    many times. Raises ValueError for a network that doesn't read causally, and for a draw other than the network's."""
    autoregressive(model, draw=draw)
    if model.config.model.self_conditioning:
        raise ValueError("particles are weighed by what single passes say: not with model.self_conditioning=true")
    return ParticleSampler(canvases=ancestral(model, draw=draw, canvas=canvas, passes=passes), particles=particles)


def revised(model: LoadedModel, writer: BlockDiffusion, *, rounds: int, span: int) -> BlockDiffusion:
    """The writer, each of whose full canvases is revised in so many rounds of a span each (see `Revision`).

    Raises ValueError where noise is no mask.
    """
    if not isinstance(model.process, Absorbing):
        raise ValueError(f"rounds mask spans again, {type(model.process).__name__} has no mask: use ancestral, correct")
    first = writer.sampler.sampler if isinstance(writer.sampler, SelfConditionedSampler) else writer.sampler
    sampler = Revision(sampler=first, rounds=rounds, span=span, mask=writer.mask)
    if sampler.passes > MOST_PASSES:
        raise ValueError(f"passes and rounds must take at most {MOST_PASSES} passes, not {sampler.passes}")
    return dataclasses.replace(writer, sampler=_conditioned(model, sampler))


def _conditioned(model: LoadedModel, sampler: Any) -> Any:
    """The sampler, which feeds back what the network said if the network was trained so."""
    architecture = model.config.model
    return (
        SelfConditionedSampler(sampler=sampler, width=architecture.width) if architecture.self_conditioning else sampler
    )


def _closing(model: LoadedModel) -> int:
    """The end of text that closes a canvas; none where rows of several texts were one canvas in training."""
    return model.tokenizer.eos if model.config.objective.layout.closed_by_eos else -1


def _width(model: LoadedModel, canvas: int) -> int:
    return canvas or model.config.objective.layout.canvas_length(model.config.data.seq_len)


def _canvases(model: LoadedModel, sampler: Any, canvas: int, record: bool) -> BlockDiffusion:
    """canvas 0: as wide as in training."""
    objective, tokenizer = model.config.objective, model.tokenizer
    if not objective.layout.denoises:
        raise ValueError(f"{type(objective).__name__} trains no canvases: sample with autoregressive")
    if isinstance(model.process, Gaussian) and not isinstance(sampler, EmbeddingFlowSampler):
        raise ValueError(f"{type(sampler).__name__} undoes noise on tokens, here it lies on vectors: use embedding")
    if sampler.passes > MOST_PASSES:
        raise ValueError(f"passes must be at most {MOST_PASSES}, not {sampler.passes}")
    canvas = _width(model, canvas)
    if canvas > model.config.data.seq_len:
        raise ValueError(f"canvas={canvas} is wider than the model's context of {model.config.data.seq_len}")
    return BlockDiffusion(
        sampler=_conditioned(model, sampler),
        canvas=canvas,
        mask=tokenizer.mask,
        eos=tokenizer.eos,
        clean=objective.layout.prefix,
        align=objective.layout.align,
        record=record,
    )
