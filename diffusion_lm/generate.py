"""The writer that fits a trained network, one function a way of writing; and `write`, which hands it prompts."""

import dataclasses
from typing import Any

from diffusion_lm import costs
from diffusion_lm.answers import Answer, fill, story, write
from diffusion_lm.build import Model
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.approximate import Approximate
from diffusion_lm.samplers.auto import Auto
from diffusion_lm.samplers.autoregressive import Autoregressive
from diffusion_lm.samplers.canvases import Canvases
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.drafts import Drafter, Lookup
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.samplers.embedding_flow import EmbeddingFlow
from diffusion_lm.samplers.pace import Even, Pace
from diffusion_lm.samplers.population import Population
from diffusion_lm.samplers.remasking import Cap, Remask, Remasking
from diffusion_lm.samplers.renoising import Renoising
from diffusion_lm.samplers.revision import Revision
from diffusion_lm.samplers.self_conditioning import SelfConditioned
from diffusion_lm.samplers.speculative import Speculative
from diffusion_lm.samplers.stale import Dual, Policy
from diffusion_lm.types import Causal

__all__ = [
    "Answer", "ancestral", "approximate", "auto", "autoregressive", "confidence", "embedding", "fill", "population",
    "remasking", "renoising", "reverse", "revised", "speculative", "story", "write",
]  # fmt: skip
MOST_PASSES = 100_000
EVEN = Even()
CAP = Cap()
DUAL = Dual()


def autoregressive(model: Model, *, draw: Draw) -> Autoregressive:
    """The writer of one token a pass. Raises ValueError if the network didn't learn to write so."""
    objective = model.config.objective
    if not objective.causal:
        raise ValueError(
            f"{type(objective).__name__} doesn't train the causal reading: sample with confidence or ancestral"
        )
    return Autoregressive(mask=model.tokenizer.mask, eot=model.tokenizer.eot, draw=draw)


def speculative(
    model: Model, *, draw: Draw, drafter: Drafter | None = None, break_even: float | None = None
) -> Speculative:
    """The writer that guesses and checks: the autoregressive text, sooner where guesses (by default: what followed the
    last time) are good. break_even: see `Speculative`; None: measured here, which compiles two programs.

    Raises ValueError if the network didn't learn to write token by token, or to clear the masks that it guesses by.
    """
    plain, drafter = autoregressive(model, draw=draw), drafter or Lookup()
    masks = isinstance(model.process, Absorbing) and model.config.objective.canvas > 1
    if (drafter.passes or drafter.masks) and not masks:
        raise ValueError(
            f"{type(drafter).__name__} guesses by canvases of masks, which this network didn't learn: use Lookup"
        )
    drafts = Speculative(drafter=drafter, mask=plain.mask, eot=plain.eot, draw=draw)
    return dataclasses.replace(
        drafts, break_even=costs.break_even(model, plain, drafts) if break_even is None else break_even
    )


def auto(model: Model, *, draw: Draw, canvas: int, passes: int) -> Auto:
    """The writer that takes the faster of canvases (in so many passes) and token by token, by costs measured here:
    which it takes, and so its text, depends on the machine."""
    plain, canvases = autoregressive(model, draw=draw), confidence(model, draw=draw, canvas=canvas, passes=passes)
    tail = speculative(model, draw=draw)
    return Auto(canvases=canvases, tail=tail, costs=costs.measured(model, plain, canvases))


def confidence(
    model: Model, *, draw: Draw, canvas: int, passes: int | None = None, pace: Pace = EVEN, record: bool = False
) -> Canvases:
    """The writer of canvases that commits the surest positions first, as many a pass as `pace` says.

    passes None: as many as it takes. Raises ValueError where noise is no mask.
    """
    if not isinstance(model.process, Absorbing):
        raise ValueError(
            f"confidence fills in masks, {type(model.process).__name__} has other noise: use ancestral or embedding"
        )
    passes = _width(model, canvas) if passes is None else passes
    sampler = Confidence(passes=passes, eot=_closing(model), draw=draw, pace=pace)
    return _canvases(model, sampler, canvas, record)


def approximate(
    model: Model,
    *,
    draw: Draw,
    canvas: int,
    passes: int | None = None,
    pace: Pace = EVEN,
    cache: Policy = DUAL,
    record: bool = False,
) -> Approximate:
    """`confidence` over an approximate cache, for a network that reads whole rows both ways: a pass reads what `cache`
    asks for again, and sees the rest as it was. docs/caches.md has what that saves and costs.

    Raises ValueError where noise is no mask, or the network has an exact cache.
    """
    if model.config.model.self_conditioning:
        raise ValueError("approximate caches feed back no soft prediction: leave the cache out")
    exact = confidence(model, draw=draw, canvas=canvas, passes=passes, pace=pace, record=record)
    if exact.align:
        raise ValueError(f"{type(model.config.objective).__name__} has an exact cache: leave the approximate one out")
    return Approximate(policy=cache, **{field.name: getattr(exact, field.name) for field in dataclasses.fields(exact)})


def ancestral(
    model: Model, *, draw: Draw, canvas: int, passes: int, correct: int = 0, record: bool = False
) -> Canvases:
    """The writer of canvases that follows the reverse process; the last `correct` of its passes correct."""
    sampler = Ancestral(process=model.process, passes=passes, eot=_closing(model), draw=draw, correct=correct)
    return _canvases(model, sampler, canvas, record)


def embedding(
    model: Model, *, draw: Draw, canvas: int, passes: int, churn: float = 1.0, record: bool = False
) -> Canvases:
    """The writer of canvases that takes noise off vectors; churn 0: by the flow's ODE, 1: by the diffusion's posterior.
    Raises ValueError where noise lies on tokens."""
    sampler = EmbeddingFlow(process=model.process, passes=passes, eot=_closing(model), draw=draw, churn=churn)
    return _canvases(model, sampler, canvas, record)


def reverse(model: Model, *, draw: Draw, canvas: int, passes: int) -> Canvases:
    """The writer of canvases that undoes the noise as the process has it, whatever it lies on; a student of a flow
    by the ODE that it was taught."""
    if not isinstance(model.process, Gaussian):
        return ancestral(model, draw=draw, canvas=canvas, passes=passes)
    churn = 0.0 if isinstance(model.config.objective, Distillation) else 1.0
    return embedding(model, draw=draw, canvas=canvas, passes=passes, churn=churn)


def remasking(
    model: Model, *, draw: Draw, canvas: int, passes: int, remask: Remask = CAP, record: bool = False
) -> Canvases:
    """The writer of canvases that takes tokens back as `remask` says. Raises ValueError where noise is no mask."""
    sampler = Remasking(process=model.process, passes=passes, eot=_closing(model), draw=draw, remask=remask)
    return _canvases(model, sampler, canvas, record)


def renoising(model: Model, *, draw: Draw, canvas: int, passes: int, record: bool = False, **options) -> Canvases:
    """The writer of canvases that keeps what may be drawn together and renoises the rest, until the canvas stands
    still (see `Renoising` for options). Raises ValueError where noise is masks."""
    sampler = Renoising(process=model.process, passes=passes, eot=_closing(model), draw=draw, **options)
    return _canvases(model, sampler, canvas, record)


def population(model: Model, *, draw: Draw, canvas: int, passes: int, particles: int) -> Population:
    """The writer of `particles` texts at once, the better of which go on (see `Population`): give it each prompt so
    many times. Raises ValueError for a network that doesn't read causally, and for a draw other than the network's."""
    autoregressive(model, draw=draw)
    if model.config.model.self_conditioning:
        raise ValueError("particles are weighed by what single passes say: not with model.self_conditioning=true")
    return Population(canvases=ancestral(model, draw=draw, canvas=canvas, passes=passes), particles=particles)


def revised(model: Model, writer: Canvases, *, rounds: int, span: int) -> Canvases:
    """The writer, each of whose full canvases is revised in so many rounds of a span each (see `Revision`).

    Raises ValueError where noise is no mask.
    """
    if not isinstance(model.process, Absorbing):
        raise ValueError(f"rounds mask spans again, {type(model.process).__name__} has no mask: use ancestral, correct")
    first = writer.sampler.sampler if isinstance(writer.sampler, SelfConditioned) else writer.sampler
    sampler = Revision(sampler=first, rounds=rounds, span=span, mask=writer.mask)
    if sampler.passes > MOST_PASSES:
        raise ValueError(f"passes and rounds must take at most {MOST_PASSES} passes, not {sampler.passes}")
    return dataclasses.replace(writer, sampler=_conditioned(model, sampler))


def _conditioned(model: Model, sampler: Any) -> Any:
    """The sampler, which feeds back what the network said if the network was trained so."""
    architecture = model.config.model
    return SelfConditioned(sampler=sampler, width=architecture.width) if architecture.self_conditioning else sampler


def _closing(model: Model) -> int:
    """The end of text that closes a canvas; none where rows of several texts were one canvas in training."""
    return -1 if model.config.objective.prefix is None else model.tokenizer.eot


def _width(model: Model, canvas: int) -> int:
    return canvas or model.config.objective.canvas or model.config.data.length


def _canvases(model: Model, sampler: Any, canvas: int, record: bool) -> Canvases:
    """canvas 0: as wide as in training."""
    objective, tokenizer = model.config.objective, model.tokenizer
    if objective.canvas == 1 and objective.prefix is None:
        raise ValueError(f"{type(objective).__name__} trains no canvases: sample with autoregressive")
    if isinstance(model.process, Gaussian) and not isinstance(sampler, EmbeddingFlow):
        raise ValueError(f"{type(sampler).__name__} undoes noise on tokens, here it lies on vectors: use embedding")
    if sampler.passes > MOST_PASSES:
        raise ValueError(f"passes must be at most {MOST_PASSES}, not {sampler.passes}")
    canvas = _width(model, canvas)
    if canvas > model.config.data.length:
        raise ValueError(f"canvas={canvas} is wider than the model's context of {model.config.data.length}")
    align = 0 if objective.prefix is None else getattr(objective.prefix, "block", 1)
    return Canvases(
        sampler=_conditioned(model, sampler),
        canvas=canvas,
        mask=tokenizer.mask,
        eot=tokenizer.eot,
        clean=objective.prefix or Causal(),
        align=align,
        record=record,
    )
