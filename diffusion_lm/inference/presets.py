"""The text sampler that fits a trained network, one function a method. `block_diffusion` takes a sampler of your
own."""

import dataclasses

import numpy as np

from diffusion_lm.build import LoadedModel
from diffusion_lm.inference import autotune
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.auto import Auto
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import CanvasSampler, fields_of
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.cache_policy import CachePolicy, DualCache
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.drafters import Drafter, PromptLookup, TiDARDraft, TrainedDraft
from diffusion_lm.samplers.embedding_flow import EmbeddingFlowSampler
from diffusion_lm.samplers.particles import ParticleSampler
from diffusion_lm.samplers.remasking import Cap, Remasking, RemaskingSchedule
from diffusion_lm.samplers.renoising import Renoising
from diffusion_lm.samplers.revision import Revision
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.speculative import Speculative

MAX_STEPS = 100_000
CAP, DUAL = Cap(), DualCache()
_ACCEPTANCE = 0.7  # of a mask's token where all before it are, as drafters are compared: half of four masks' tokens


def fitting(model: LoadedModel) -> str:
    """The name, in `by_name.SAMPLERS`, of a sampler for the network: "autoregressive" where it has no canvases,
    "confidence" for masks, "ancestral" for other noise on tokens, "embedding_flow" for noise on embeddings."""
    if not model.config.objective.layout.denoises:
        return "autoregressive"
    if isinstance(model.process, Absorbing):
        return "confidence"
    return "embedding_flow" if isinstance(model.process, Gaussian) else "ancestral"


def autoregressive(model: LoadedModel, *, sampling: SamplingParams) -> AutoregressiveSampler:
    """One token a forward pass. Raises ValueError if the network wasn't trained autoregressively."""
    objective = model.config.objective
    if not objective.trains_ar:
        raise ValueError(f"{type(objective).__name__} doesn't train autoregression: sample with {fitting(model)}")
    tokenizer = model.tokenizer
    return AutoregressiveSampler(mask=tokenizer.mask, eos=tokenizer.eos, stops=_stops(model), sampling=sampling)


def speculative(
    model: LoadedModel, *, sampling: SamplingParams, drafter: Drafter | None = None, break_even: float | None = None
) -> Speculative:
    """The autoregressive text, sooner where drafts are right. A drafter that asks the network drafts what followed the
    last time where the text repeats itself.

    drafter     None: of a network that was trained to draft the shape and the number of masks that would be fastest
                (`TrainedDraft` or `TiDARDraft`), by times measured here, if half of each draft makes up for its time;
                else `PromptLookup`
    break_even  see `Speculative`; None: measured here, which compiles two programs

    Raises ValueError if the network wasn't trained autoregressively, or not on the masks that the drafter asks about.
    """
    plain, masks = autoregressive(model, sampling=sampling), model.config.objective.draft_length
    chosen = drafter
    if drafter is None and masks:
        drafter = TrainedDraft(num_tokens=masks + 1) if break_even is not None else _fastest(model, masks)
    drafter = drafter or PromptLookup()
    asks = drafter.num_passes + drafter.canvas_length > 0
    canvases = isinstance(model.process, Absorbing) and model.config.objective.layout.denoises
    if asks and not (masks if drafter.causal else canvases):
        needed = "to draft (objective=Drafting)" if drafter.causal else "on canvases of masks"
        raise ValueError(f"{type(drafter).__name__} needs a network trained {needed}: use PromptLookup")
    sampler = Speculative(drafter=drafter, mask=plain.mask, eos=plain.eos, sampling=sampling)
    measured = autotune.break_even(model, plain, sampler) if break_even is None else break_even
    sampler = dataclasses.replace(sampler, break_even=measured, repeats=asks)  # measured without: each draft is made
    if chosen is None and asks and sampler.is_dear:
        return speculative(model, sampling=sampling, drafter=PromptLookup(), break_even=break_even)
    return sampler


def _fastest(model: LoadedModel, masks: int) -> Drafter | None:
    """What a network that was trained on so many masks would write with soonest, by the times of passes of three
    widths; None where nothing is faster than a token a pass."""
    counts = sorted({masks, (masks + 1) // 2})
    drafters = [TrainedDraft(num_tokens=n + 1) for n in counts] + [
        TiDARDraft(num_tokens=n, causal=True) for n in counts
    ]
    widths = (1, masks + 1, (masks + 1) ** 2)
    times = autotune.pass_seconds(model, widths)

    def gain(drafter: Drafter) -> float:
        verified = (drafter.num_tokens + 1) * (1 + drafter.canvas_length)
        drafting_s, verifying_s = np.interp([drafter.num_tokens, verified], widths, times)
        cost = (drafter.num_passes * drafting_s + verifying_s) / times[0]
        return drafter.expected_tokens(_ACCEPTANCE) / cost

    best = max(drafters, key=gain)
    return best if gain(best) > 1 else None


def auto(model: LoadedModel, *, sampling: SamplingParams, canvas_length: int, denoising_steps: int) -> Auto:
    """The faster of canvases (in so many steps) and token by token, by costs measured here: the choice, and so the
    text, depends on the machine."""
    plain = autoregressive(model, sampling=sampling)
    blocks = confidence(model, sampling=sampling, canvas_length=canvas_length, denoising_steps=denoising_steps)
    rest = speculative(model, sampling=sampling)
    return Auto(block_diffusion=blocks, speculative=rest, costs=autotune.pass_costs(model, plain, blocks))


def confidence(
    model: LoadedModel, *, canvas_length: int, denoising_steps: int | None = None, record: bool = False, **options
) -> BlockDiffusion:
    """Canvases that commit the most certain positions first. options: those of `Confidence` (sampling, schedule).

    denoising_steps None: as many as it takes. Raises ValueError where noise isn't masks.
    """
    _check_noise(model, isinstance(model.process, Absorbing), "confidence needs masks")
    steps = _canvas_length(model, canvas_length) if denoising_steps is None else denoising_steps
    sampler = Confidence(denoising_steps=steps, eos=_eos(model), **options)
    return block_diffusion(model, sampler, canvas_length=canvas_length, record=record)


def approximate_cache(model: LoadedModel, *, policy: CachePolicy = DUAL, **options) -> BlockDiffusion:
    """`confidence`, whose options it takes, over an approximate cache, for a network with full attention: a step
    computes what `policy` names and attends to the rest as it was (measured in docs/results/cache_drift.md).

    Raises ValueError where noise isn't masks, or the network has an exact cache.
    """
    if model.config.model.self_conditioning:
        raise ValueError("approximate caches don't work with self-conditioning: leave the cache out")
    exact = confidence(model, **options)
    if exact.align:
        raise ValueError(f"{type(model.config.objective).__name__} has an exact cache: leave the approximate one out")
    return dataclasses.replace(exact, approximate_cache=policy)


def ancestral(model: LoadedModel, *, canvas_length: int, record: bool = False, **options) -> BlockDiffusion:
    """Canvases by the reverse process. options: those of `Ancestral` (denoising_steps, sampling, corrector_steps)."""
    _check_noise(model, not isinstance(model.process, Gaussian), "ancestral needs noise on tokens")
    sampler = Ancestral(process=model.process, eos=_eos(model), **options)
    return block_diffusion(model, sampler, canvas_length=canvas_length, record=record)


def embedding_flow(model: LoadedModel, *, canvas_length: int, record: bool = False, **options) -> BlockDiffusion:
    """Canvases by denoising embeddings. options: those of `EmbeddingFlowSampler` (denoising_steps, sampling, churn).
    Raises ValueError where noise is on tokens."""
    _check_noise(model, isinstance(model.process, Gaussian), "embedding_flow needs noise on embeddings")
    sampler = EmbeddingFlowSampler(process=model.process, eos=_eos(model), **options)
    return block_diffusion(model, sampler, canvas_length=canvas_length, record=record)


def reverse_process(model: LoadedModel, **options) -> BlockDiffusion:
    """`ancestral`, or `embedding_flow` where noise is on embeddings; a student of a flow by the ODE that it was
    taught."""
    if not isinstance(model.process, Gaussian):
        return ancestral(model, **options)
    return embedding_flow(model, churn=0.0 if isinstance(model.config.objective, Distillation) else 1.0, **options)


def remasking(
    model: LoadedModel, *, canvas_length: int, remask: RemaskingSchedule = CAP, record: bool = False, **options
) -> BlockDiffusion:
    """Canvases with remasking by `remask`. options: those of `Remasking` (denoising_steps, sampling). Raises ValueError
    where noise isn't masks."""
    _check_noise(model, isinstance(model.process, Absorbing), "remasking needs masks")
    sampler = Remasking(process=model.process, eos=_eos(model), remask=remask, **options)
    return block_diffusion(model, sampler, canvas_length=canvas_length, record=record)


def renoising(model: LoadedModel, *, canvas_length: int, record: bool = False, **options) -> BlockDiffusion:
    """Canvases that keep what can be sampled together and renoise the rest, until they are stable. options: those of
    `Renoising` (denoising_steps, sampling, schedule, ...). Raises ValueError where noise is masks."""
    fits = not isinstance(model.process, Absorbing | Gaussian)
    _check_noise(model, fits, "renoising needs noise that is tokens")
    sampler = Renoising(process=model.process, eos=_eos(model), **options)
    return block_diffusion(model, sampler, canvas_length=canvas_length, record=record)


def particles(model: LoadedModel, *, num_particles: int, **options) -> ParticleSampler:
    """Sequential Monte Carlo with `num_particles` rows a prompt (see `ParticleSampler`): repeat each prompt so often.
    options: those of `ancestral`.

    Raises ValueError for a network that isn't autoregressive, and for a distribution other than the network's."""
    autoregressive(model, sampling=options["sampling"])
    return ParticleSampler(**fields_of(ancestral(model, **options)), num_particles=num_particles)


def revised(model: LoadedModel, blocks: BlockDiffusion, *, rounds: int, span: int) -> BlockDiffusion:
    """`blocks` with so many rounds of revision, a span each, of every full canvas (see `Revision`). Raises ValueError
    where noise isn't masks."""
    if not isinstance(model.process, Absorbing):
        remedy = "leave it out" if isinstance(model.process, Gaussian) else "use ancestral with corrector_steps"
        raise ValueError(f"revision needs masks, {type(model.process).__name__} has other noise: {remedy}")
    sampler = Revision(sampler=blocks.sampler, rounds=rounds, span=span, mask=blocks.mask)
    if sampler.denoising_steps > MAX_STEPS:
        raise ValueError(f"steps and rounds must make at most {MAX_STEPS} steps; got {sampler.denoising_steps}")
    return dataclasses.replace(blocks, sampler=sampler)


def block_diffusion(
    model: LoadedModel, sampler: CanvasSampler, *, canvas_length: int = 0, record: bool = False
) -> BlockDiffusion:
    """Canvases denoised by any sampler, as the network was trained to.

    canvas_length  0: as in training
    record         keep each step's canvas

    Raises ValueError for a network that wasn't trained on canvases, or not on the sampler's noise.
    """
    config, tokenizer = model.config, model.tokenizer
    objective, architecture = config.objective, config.model
    noise = "embeddings" if sampler.uses_embeddings else "tokens"
    fits = isinstance(model.process, Gaussian) == sampler.uses_embeddings
    _check_noise(model, fits, f"{type(sampler).__name__} needs noise on {noise}")
    if sampler.denoising_steps > MAX_STEPS:
        raise ValueError(f"denoising_steps must be at most {MAX_STEPS}; got {sampler.denoising_steps}")
    canvas_length = _canvas_length(model, canvas_length)
    if canvas_length > config.data.seq_len:
        raise ValueError(f"canvas_length={canvas_length} is wider than the model's context of {config.data.seq_len}")
    return BlockDiffusion(
        sampler=sampler,
        canvas_length=canvas_length,
        mask=tokenizer.mask,
        eos=tokenizer.eos,
        stops=_stops(model),
        clean=objective.layout.prefix,
        align=objective.layout.align,
        record=record,
        self_cond_dim=architecture.width if architecture.self_conditioning else 0,
    )


def _check_noise(model: LoadedModel, fits: bool, needs: str) -> None:
    """Raises ValueError, with a sampler to use instead, where the network has no canvases, or where its noise doesn't
    fit what a sampler needs."""
    if not model.config.objective.layout.denoises:
        raise ValueError(f"{type(model.config.objective).__name__} trains no canvases: sample with {fitting(model)}")
    if not fits:
        raise ValueError(f"{needs}, {type(model.process).__name__} is other noise: use {fitting(model)}")


def _eos(model: LoadedModel) -> int:
    """The end of text that closes a canvas; -1 where rows of several texts were one canvas in training."""
    return model.tokenizer.eos if model.config.objective.layout.closed_by_eos else -1


def _stops(model: LoadedModel) -> tuple[int, ...]:
    """Ends of a text beside the end of text."""
    return tuple(stop for stop in model.tokenizer.stops if stop != model.tokenizer.eos)


def _canvas_length(model: LoadedModel, canvas_length: int) -> int:
    return canvas_length or model.config.objective.layout.canvas_length(model.config.data.seq_len)
