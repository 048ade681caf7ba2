"""Configs that begin from others' models: each loads, survives JSON, and its loss fits the family it is for."""

import dataclasses
import json
import types
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from support.parity import folder

from diffusion_lm.build import abstract_batch, build_init, build_loss, build_model, resolve
from diffusion_lm.config import from_json, load, override, to_json
from diffusion_lm.convert.huggingface import open_folder
from diffusion_lm.convert.loading import describe
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.nn.lora import Full

FOLDER = Path(__file__).parents[2] / "configs/adapt"
FAMILIES = {  # kinds, and the fixture of the family that they begin from
    "smollm2_sft": (("ar", "lora", "joint", "block", "masked"), "llama"),
    "qwen3_0_6b_a2d": (("block", "masked"), "qwen3"),
    "qwen2_5_1_5b_joint": (("",), "qwen2"),
    "qwen2_5_1_5b_blocks": (("",), "qwen2"),
    "llada_8b_sft": (("",), "llada"),
}
ALL = [(name, kind) for name, (kinds, _) in FAMILIES.items() for kind in kinds]


def config_of(name, kind):
    return load(f"{FOLDER}/{name}.py" + (f":{kind}" if kind else ""))


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_loads_and_survives_json(name, kind):
    config = config_of(name, kind)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert config.objective.layout.round_up(config.data.seq_len) == config.data.seq_len
    if isinstance(config.data, PromptResponse):
        assert config.data.chat


@pytest.mark.parametrize("name", [name for name, (kinds, _) in FAMILIES.items() if kinds != ("",)])
def test_a_kind_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match="kind 'other' is none of"):
        config_of(name, "other")


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_its_loss_fits_a_tiny_network_of_the_family(name, kind):
    """Shapes alone: without weights, text or a tokenizer; of adapters the network that they lie beside."""
    spec = describe(open_folder(folder(FAMILIES[name][1])))[1].spec
    config = override(config_of(name, kind), ["train.batch_size=8", "data.seq_len=64"])
    config = dataclasses.replace(config, trainable=Full())
    config = resolve(config, to_json(dataclasses.replace(config, model=spec)))
    module, process = build_model(config, types.SimpleNamespace(mask=spec.vocabulary.mask))
    params = nn.meta.unbox(jax.eval_shape(build_init(module, process), jax.random.key(0), {}))
    losses = jax.eval_shape(build_loss(config, module, process), params, jax.random.key(0), abstract_batch(config), {})
    assert set(losses) == ({"causal"} if config.objective.trains_ar else set()) | (
        {"canvas"} if config.objective.layout.denoises else set()
    )
