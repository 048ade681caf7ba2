"""Configs that train beside or from a causal model: each loads, survives JSON, and begins with a tiny converted one."""

import json
from pathlib import Path

import pytest

from diffusion_lm.build import build
from diffusion_lm.config import from_json, load, override, to_json
from diffusion_lm.nn.lora import LoRA

FOLDER = Path(__file__).parents[2] / "configs/adapt"
ALL = ("smollm2_draft.py", "smollm2_joint.py:full", "smollm2_joint.py:lora")


@pytest.mark.parametrize("name", ALL)
def test_it_begins_with_a_converted_model(name, converted, lines, tmp_path):
    config = load(f"{FOLDER}/{name}")
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    small = [f"train.init={converted[0]}", f"data.path={lines}", "data.seq_len=128", "train.batch_size=4"]
    small += ["objective.num_anchors=64"] if name == "smollm2_draft.py" else []  # as the rows are shorter
    made = build(override(config, small), tmp_path / "run")
    frozen = isinstance(config.trainable, LoRA)
    assert made.config.model == converted[1].config.model and ("base" in made.job.constants) == frozen


def test_a_kind_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="kind 'other' is none of full, lora"):
        load(f"{FOLDER}/smollm2_joint.py:other")
