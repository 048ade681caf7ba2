"""How each family's own code samples: presets made of our parts, with the names and defaults of that code.

`family_samplers.PUBLISHED` is the one table. A setting is what the user gives, else what the checkpoint's
generation_config.json says, else the family's default. What that file asks for that isn't implemented is refused by
name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_lm.build import LoadedModel
from diffusion_lm.convert.huggingface import parse_json
from diffusion_lm.inference import pipeline
from diffusion_lm.inference.family_samplers import CAUSAL, PUBLISHED, Published
from diffusion_lm.models.family_index import family_of
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.logits_processors import RepetitionPenalty

DEFAULT_NEW_TOKENS = 256
# What a generation_config.json may say that leaves the text as it is.
_NEUTRAL = {
    "length_penalty": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
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
    "max_length": None, "cfg_scale": 0.0, "repetition_penalty": 1.0,
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


def preset(model: LoadedModel, **given: Any) -> Preset:
    """The published sampler of a converted model.

    Args:
      model: a converted model.
      given: settings by our names (temperature, top_k, top_p, min_p, cfg_scale, repetition_penalty, denoising_steps,
        canvas_length; record; suppressed, ids beside the tokenizer's own) or by the family's; None: not given.

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
    settings |= _from_file(model, found, settings) | given | {"suppressed": (*model.tokenizer.suppressed, *suppressed)}
    sampler = found.make(model, settings)
    if (penalty := settings["repetition_penalty"]) != 1:
        if _has_canvas(model) and not isinstance(model.process, Absorbing):
            raise ValueError(f"repetition_penalty={penalty} would count noise: set it to 1")
        sampler = dataclasses.replace(sampler, logits_processor=RepetitionPenalty(penalty=penalty))
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
    return PUBLISHED.get(family_of(source["config"], "the source"), None if _has_canvas(model) else CAUSAL)


def _has_canvas(model: LoadedModel) -> bool:
    return model.config.objective.layout.denoises


def _from_file(model: LoadedModel, published: Published, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the checkpoint's generation_config.json, by their names here."""
    text = model.meta.source["companions"].get("generation_config.json")
    if text is None:
        return {}
    found, settings = _flat(parse_json(text, "generation_config.json"), published.groups), {}
    for key, value in found.items():
        unset = value is None or (value is False and key not in known)
        if key in _SAYS_NOTHING or unset or value == _NEUTRAL.get(key, known):
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


def _flat(found: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, Any]:
    """A generation_config.json with the settings of its groups beside the others."""
    flat = {}
    for key, value in found.items():
        if key not in groups or value is None:
            flat[key] = value
        elif not isinstance(value, dict) or value.get("_cls_name", groups[key]) != groups[key]:
            raise ValueError(
                f"generation_config.json sets {key}={value!r}, which isn't implemented: only {groups[key]}"
            )
        else:
            flat |= {name: inner for name, inner in value.items() if name != "_cls_name"}
    return flat
