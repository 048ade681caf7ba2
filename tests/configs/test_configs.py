"""Chain config, of every kind: it loads, survives JSON, has the size it states, and trains when made tiny."""

import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.build import build
from diffusion_lm.config import from_json, load, override, to_json
from diffusion_lm.models.base import Vocabulary
from diffusion_lm.models.transformer import Transformer, init_params

ROOT = Path(__file__).parents[2]
# What each docstring states in parameters, and how many pieces that takes: a char tokenizer has 259 beside those seen.
STATED = {
    "quickstart": (1.13e6, 2048),
    "tinyshakespeare": (0.9e6, 65 + 259),
    "speedrun": (0.9e6, 65 + 259),
    "text8": (85e6, 27 + 259),
    "owt": (162e6, 50_257),
    "base_125m": (126e6, 32_768),
    "base_1b": (1.02e9, 32_768),
    "base_8b": (8.05e9, 131_072),
    "moe_26b_a4b": (25.5e9, 262_144),
}
KINDS = {
    "tinyshakespeare": (
        "ar",
        "masked",
        "uniform",
        "mixture",
        "score",
        "flow",
        "embedding",
        "block",
        "joint",
        "joint_uniform",
        "learned",
    ),
    "speedrun": ("ar", "masked", "joint"),
    "text8": ("ar", "masked", "block4", "block8", "block16", "joint"),
    "owt": ("ar", "masked", "block4", "block8", "block16"),
}
ALL = [f"{name}:{kind}" for name in STATED for kind in KINDS.get(name, ("",))]
STEPPED = ("base_1b:", "tinyshakespeare:mixture", "tinyshakespeare:score")  # other tests train the rest


def config_of(name):
    file, _, kind = name.partition(":")
    return load(f"{ROOT}/configs/{file}.py" + (f":{kind}" if kind else ""))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of JSON lines, which any of the configs can read."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"{i} green bottles hang on wall {i % 7}, and {i * i} more"}) for i in range(200)]
    path.write_text("\n".join(lines))
    return path


def tiny(config, text, tmp_path):
    """The same experiment, small: only sizes and places change."""
    small = (
        "model.width=16 model.layers=1 model.heads=2 model.kv_heads=1 model.mlp_dim=16 train.steps=2 train.batch_size=8"
    )
    small += " mesh.expert=1"
    places = [f"data.path={text}", f"data.token_cache_dir={tmp_path / 'tokens'}"]
    length = config.objective.layout.round_up(32)
    return override(config, [*small.split(), *places, f"data.seq_len={length}", "data.vocab_size=300"])


def test_no_config_is_forgotten():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"} == set(STATED)


@pytest.mark.parametrize("name", ALL)
def test_loads_and_survives_json(name):
    config = config_of(name)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match="kind 'other' is none of ar, masked"):
        config_of(f"{name}:other")


def test_kinds_of_a_file_are_different_experiments():
    for name, kinds in KINDS.items():
        assert len({(c.process, c.objective) for c in (config_of(f"{name}:{kind}") for kind in kinds)}) == len(kinds)


@pytest.mark.parametrize("name", STATED)
def test_has_the_parameters_it_states(name):
    stated, vocab = STATED[name]
    module = Transformer(config_of(name).model, Vocabulary(size=vocab, mask=vocab))
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == pytest.approx(stated, rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_a_tiny_one_can_be_assembled(name, text, tmp_path):
    run = build(tiny(config_of(name), text, tmp_path), tmp_path / "workdir")
    assert next(run.job.batches).tokens.shape == (8, run.config.data.seq_len)


@pytest.mark.parametrize("name", STEPPED)
def test_a_tiny_one_takes_a_finite_step(name, text, tmp_path):
    config = tiny(config_of(name), text, tmp_path)
    job = build(config, tmp_path / "workdir").job
    before = job.initial()
    table = np.asarray(before.params["embedding"])
    batch = jax.tree.map(lambda x: x[None], next(job.batches))
    after, metrics = job.step(before, job.key, job.put(batch), job.constants)
    assert int(after.step) == 1
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(metrics))
    # An untrained network knows nothing: about log V nats for every part of the objective.
    assert 0 < float(metrics["loss"][0]) < 3 * np.log(300)
    assert not np.array_equal(table, after.params["embedding"])
