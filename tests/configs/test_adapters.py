"""Configs that train beside or from a causal model: each loads, survives JSON, and begins with a tiny converted one."""

import dataclasses
import json
from pathlib import Path

import pytest

from diffusion_lm.build import build
from diffusion_lm.config import from_json, load, override, to_json
from diffusion_lm.data.prompt_response import PromptResponse
from diffusion_lm.nn.lora import LoRA

FOLDER = Path(__file__).parents[2] / "configs/adapt"
ALL = ("smollm2_draft.py", "smollm2_joint.py:full", "smollm2_joint.py:lora")


@pytest.mark.parametrize("name", ALL)
def test_it_begins_with_a_converted_model(name, converted, lines, tmp_path):
    config = load(f"{FOLDER}/{name}")
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    data = tmp_path / "lines.txt"
    data.write_text(lines.read_text().replace("\n", "\n\n"))
    if isinstance(config.data, PromptResponse):
        data = tmp_path / "records.jsonl"
        data.write_text((json.dumps({"prompt": "the cat", "completion": " sat on the mat" * 9}) + "\n") * 32)
    small = [f"train.init={converted[0]}", f"data.path={data}", "data.seq_len=128", "train.batch_size=4"]
    made = build(override(config, small), tmp_path / "run")
    frozen = isinstance(config.trainable, LoRA)
    model = dataclasses.replace(converted[1].config.model, logit_shift=bool(config.model.logit_shift))
    assert made.config.model == model and ("base" in made.job.constants) == frozen


def test_a_kind_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="kind 'other' is none of full, lora"):
        load(f"{FOLDER}/smollm2_joint.py:other")
