"""PEFT's files: adapters by the documented format compute what their sum with the base does, and come back the same."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert.test_loading import CONFIG, HEAD_DIM, HEADS, IDS, MLP, WIDTH, tensors, tokenizer_files
from support import small
from support.begun import config_of, drawn

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.build import load_for_inference
from diffusion_lm.convert import loading
from diffusion_lm.convert.huggingface import read_header, write_file, write_folder
from diffusion_lm.nn.lora import LoRA
from diffusion_lm.objectives.joint import Joint

RANK, ALPHA = 3, 6.0
INPUTS = {"q_proj": WIDTH, "v_proj": WIDTH, "o_proj": HEADS * HEAD_DIM, "up_proj": WIDTH, "down_proj": MLP}
OUTPUTS = {"q_proj": HEADS * HEAD_DIM, "v_proj": HEAD_DIM, "o_proj": WIDTH, "up_proj": MLP, "down_proj": WIDTH}


def layer(i, name):
    return f"model.layers.{i}.{'mlp' if name in ('up_proj', 'down_proj') else 'self_attn'}.{name}"


def made_by_peft(folder, **settings):
    """A folder as PEFT writes it, of random adapters; its tensors."""
    rng, found = np.random.default_rng(5), {}
    for i in range(CONFIG["num_hidden_layers"]):
        for name in INPUTS:
            shapes = {"A": (RANK, INPUTS[name]), "B": (OUTPUTS[name], RANK)}
            for kind, shape in shapes.items():
                value = rng.normal(0, 0.3, shape).astype(np.float32)
                found[f"base_model.model.{layer(i, name)}.lora_{kind}.weight"] = value
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(INPUTS), "bias": "none"}
    folder.mkdir()
    write_file(folder / "adapter_model.safetensors", found)
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return found


def summed(adapters, scale):
    """The base's tensors with scale B A added."""
    sums = tensors()
    for name in {name.partition(".lora_")[0] for name in adapters}:
        a, b = (adapters[f"{name}.lora_{kind}.weight"] for kind in "AB")
        sums[f"{name.removeprefix('base_model.model.')}.weight"] += scale * b @ a
    return sums


def logits(network):
    return np.asarray(small.read(network, small.rows(9, vocab=IDS), Causal()))


@pytest.fixture(scope="module")
def attached(converted, tmp_path_factory):
    """PEFT's folder, its tensors, and the workdir that it became."""
    home = tmp_path_factory.mktemp("attached")
    adapters = made_by_peft(home / "peft")
    loading.attach(home / "peft", converted[0], home / "run")
    return home / "peft", adapters, home / "run"


def test_adapters_compute_what_their_sum_with_the_base_does(attached, tmp_path):
    _, adapters, run = attached
    write_folder(tmp_path / "sum", CONFIG, summed(adapters, ALPHA / RANK).items(), tokenizer_files())
    expected = logits(loading.load_source(tmp_path / "sum").network)
    np.testing.assert_allclose(logits(load_for_inference(run).network), expected, atol=2e-4)
    loading.merge(load_for_inference(run), tmp_path / "merged")
    merged = load_for_inference(tmp_path / "merged")
    assert merged.network.module.lora is None and merged.meta.source
    np.testing.assert_allclose(logits(merged.network), expected, atol=2e-4)
    loading.export(merged, tmp_path / "out")  # a whole model again
    found = read_header(tmp_path / "out/model.safetensors")
    assert found.keys() == tensors().keys()


def test_they_come_back_as_they_were(attached, tmp_path):
    """Every tensor that PEFT had, bit for bit; the mask's embedding beside them."""
    _, adapters, run = attached
    loading.export(load_for_inference(run), tmp_path / "out")
    found = read_header(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == adapters.keys() | {"mask_embedding"}
    for name, value in adapters.items():
        np.testing.assert_array_equal(found[name].read(), value)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (RANK, ALPHA, sorted(INPUTS))


def test_the_root_of_the_rank(converted, tmp_path):
    """rsLoRA divides alpha by the rank's root."""
    adapters = made_by_peft(tmp_path / "peft", use_rslora=True)
    loading.attach(tmp_path / "peft", converted[0], tmp_path / "run")
    write_folder(tmp_path / "sum", CONFIG, summed(adapters, ALPHA / RANK**0.5).items(), tokenizer_files())
    expected = logits(loading.load_source(tmp_path / "sum").network)
    np.testing.assert_allclose(logits(load_for_inference(tmp_path / "run").network), expected, atol=4e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True; only False"),
        ({"bias": "all"}, "bias='all'; only 'none'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 4}, "don't fit"),
    ],
)
def test_other_adapters_are_refused_in_one_line(converted, tmp_path, settings, message):
    made_by_peft(tmp_path / "peft", **settings)
    with pytest.raises(ValueError, match=message) as error:
        loading.attach(tmp_path / "peft", converted[0], tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_adapters_of_noisy_positions_have_no_such_file(converted, lines, tmp_path):
    """And can't be merged: both would change clean text."""
    model = drawn(
        config_of(lines, Joint(block_size=4), trainable=LoRA(rank=2), init=str(converted[0])), tmp_path / "run"
    )
    with pytest.raises(ValueError, match="where=noisy have no file"):
        loading.export(model, tmp_path / "out")
    with pytest.raises(ValueError, match="where=noisy can't be merged"):
        loading.merge(model, tmp_path / "merged")
    with pytest.raises(ValueError, match="holds no adapters to merge"):
        loading.merge(converted[1], tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        loading.attach(tmp_path, converted[0], tmp_path / "other")


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_pefts_own_logits(converted, attached, tmp_path):
    """Files that the package writes give its logits here, and ours give ours there."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install torch peft transformers")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_folder(tmp_path / "base", CONFIG, tensors().items(), tokenizer_files())
    rows = small.rows(9, vocab=IDS)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "base")

    def theirs(model):
        with torch.no_grad():
            return model(torch.tensor(np.asarray(rows), dtype=torch.long)).logits.float().numpy()

    loading.export(load_for_inference(attached[2]), tmp_path / "ours")
    found = theirs(peft.PeftModel.from_pretrained(load(), tmp_path / "ours"))
    np.testing.assert_allclose(logits(load_for_inference(attached[2]).network), found, atol=5e-4)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "gate_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(load(), settings)
    model.save_pretrained(tmp_path / "peft")
    loading.attach(tmp_path / "peft", converted[0], tmp_path / "run")
    np.testing.assert_allclose(logits(load_for_inference(tmp_path / "run").network), theirs(model), atol=5e-4)
    assert jnp.isfinite(jax.tree.leaves(load_for_inference(tmp_path / "run").network.params)[0]).all()
