"""Public families: our network computes what each family's own code did from the same tensors, and gives them back."""

import json

import jax
import numpy as np
import pytest
from support import parity
from support.family import TOLERANCE, Loaded

from diffusion_lm.attention_patterns import BlockCausal, Causal, Full
from diffusion_lm.convert.huggingface import open_folder
from diffusion_lm.models import family_index, gpt2, llada2, llama
from diffusion_lm.models.bound_model import unstacked
from diffusion_lm.models.family import ConfigReader
from diffusion_lm.models.family_index import family_of
from diffusion_lm.models.weights import write_tensors

ELSEWHERE = ("bd3lm", "diffusion_gemma", "md4", "mdlm", "sedd", "tiny_diffusion")  # tests of their own
FAMILIES = {family.__name__.rsplit(".")[-1]: family for family in family_index.FAMILIES} | {"llada21": llada2}
FAMILIES = {name: family for name, family in FAMILIES.items() if name not in ELSEWHERE}
CAUSAL = ("llama", "qwen2", "qwen3", "gpt2", "gemma3", "ministral3", "qwen3_moe")


def folder_of(name):
    return parity.folder(name), parity.arrays(name)


@pytest.fixture(params=FAMILIES, scope="module")
def case(request):
    folder, io = folder_of(request.param)
    return request.param, Loaded(FAMILIES[request.param], folder), io


def patterns(name, io):
    """Stored logits and the attention pattern that gives them."""
    for key in io:
        part, _, array = key.partition("/")
        if (array == "logits" and part in ("forward", "bidirectional")) or (
            part.startswith("block") and array == "logits"
        ):
            size = part.removeprefix("block")
            pattern = {"forward": Causal() if name in CAUSAL else Full(), "bidirectional": Full()}.get(part)
            yield key, pattern or BlockCausal(int(size))
        elif part == "forward" and array.startswith("block") and "logits" in array and "router" not in array:
            yield key, BlockCausal(int("".join(c for c in array.split("_")[0] if c.isdigit())))
        elif key == "forward/logits_shifted":
            yield key, Full()


def test_logits_are_the_familys_own(case):
    name, loaded, io = case
    seen = 0
    for key, pattern in patterns(name, io):
        expected, ids = io[key], io["forward/input_ids"]
        found = loaded.logits(ids, pattern)
        if "unshifted" in key:  # our head moves them: position i has what theirs has at i - 1
            found, expected = found[:, 1:], expected[:, :-1]
        loaded.close(found, expected)
        seen += 1
    assert seen


@pytest.mark.cases(4)
def test_causal_logits_of_left_padded_rows(case):
    """Padding is a document of its own: the text behind it neither sees it nor counts its positions."""
    name, loaded, io = case
    if name not in CAUSAL:
        pytest.skip("only causal families store left-padded rows with positions")
    mask, ids = io["padded/attention_mask"], io["padded/input_ids"]
    found = loaded.logits(ids, Causal(), io["padded/position_ids"], mask)
    loaded.close(found, io["padded/logits"], mask.astype(bool))


PADDED = {"llada": "logits_bidirectional_keymask", "a2d_qwen3": "logits", "lladamoe": "logits"}


@pytest.mark.parametrize("name", PADDED)
def test_full_attention_of_padded_rows(name):
    folder, io = folder_of(name)
    loaded, mask = Loaded(FAMILIES[name], folder), io["padded/attention_mask"]
    ids = io.get("padded/input_ids", io["forward/input_ids"])
    found = loaded.logits(ids, Full(), segment_ids=mask)
    loaded.close(found, io[f"padded/{PADDED[name]}"], mask.astype(bool))


@pytest.mark.cases(4)
def test_greedy_tokens(case):
    _, loaded, io = case
    if "greedy/tokens" not in io:
        pytest.skip("this family stores no greedy tokens")
    tokens, mask = io["greedy/tokens"], io["greedy/attention_mask"]
    for row, real in zip(tokens, mask, strict=True):
        text = row[len(real) - real.sum() :]
        found = loaded.logits(text[None], Causal())[0].argmax(-1)
        start = int(real.sum())
        assert (found[start - 1 : -1] == text[start:]).all()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rope_scalings(name):
    folder, io = folder_of(name)
    for file in folder.glob("rope_*.json"):
        changed = Loaded(FAMILIES[name], folder, {"rope_scaling": json.loads(file.read_text())})
        changed.close(changed.logits(io["forward/input_ids"][:1], Causal()), io[f"{file.stem}/logits"])


def without_query_growth(config):
    return {"rope_parameters": config["rope_parameters"] | {"llama_4_scaling_beta": 0.0}}


VARIANTS = {
    "use_bidirectional_attention": ("gemma3", lambda config: {"use_bidirectional_attention": True}, Full()),
    "no_llama4_scale": ("ministral3", without_query_growth, Causal()),
    "no_norm_topk": ("qwen3_moe", lambda config: {"norm_topk_prob": False}, Causal()),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_setting_of_the_config_changed(variant):
    name, changes, pattern = VARIANTS[variant]
    folder, io = folder_of(name)
    changed, expected = Loaded(FAMILIES[name], folder, changes(open_folder(folder).config)), io[f"{variant}/logits"]
    changed.close(changed.logits(io["forward/input_ids"][: len(expected)], pattern), expected)


def test_both_spellings_of_a_config_are_one_network():
    seen = 0
    for name, family in FAMILIES.items():
        folder, _ = folder_of(name)
        for file in folder.glob("config_transformers5.json"):
            reader = ConfigReader(json.loads(file.read_text()), str(file))
            assert family.describe(reader) == family.describe(ConfigReader(open_folder(folder).config))
            reader.finish()
            seen += 1
    assert seen


def test_a_sharded_bfloat16_folder():
    folder, io = folder_of("llama")
    loaded = Loaded(llama, folder / "sharded_bf16")
    loaded.close(loaded.logits(io["forward/input_ids"][:1], Causal()), io["sharded_bf16/logits"])


def test_tensors_come_back_bit_for_bit(case):
    _, loaded, _ = case
    found = dict(write_tensors(loaded.leaves, loaded.model.params, np.float32))
    assert found.keys() == {name for leaf in loaded.leaves for name in [part.tensor for part in leaf.parts]}
    for name, array in found.items():
        stored = loaded.tensors[name].read().astype(np.float32)
        assert array.shape == stored.shape and array.tobytes() == stored.tobytes()


def test_files_of_the_hub_name_gpt2s_tensors_without_a_prefix(tmp_path):
    folder, _ = folder_of("gpt2")
    for name, other in (("config.json", "config.json"), ("model_hub_names.safetensors", "model.safetensors")):
        (tmp_path / other).symlink_to((folder / name).resolve())
    hub, ours = Loaded(gpt2, tmp_path), Loaded(gpt2, folder)
    assert "h.0.attn.bias" in hub.source.tensors
    jax.tree.map(np.testing.assert_array_equal, hub.model.params, ours.model.params)


def test_the_family_of_a_config_is_found_or_refused_by_name():
    for name, family in FAMILIES.items():
        folder, _ = folder_of(name)
        assert family_of(open_folder(folder).config) is family
    with pytest.raises(ValueError, match=r"model_type='bert', which isn't implemented: known are .*, llama, "):
        family_of({"model_type": "bert"})
    with pytest.raises(ValueError, match="names no model_type"):
        family_of({})


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_stacked_layers_are_layers_apart(name):
    folder, io = folder_of(name)
    apart, together = Loaded(FAMILIES[name], folder), Loaded(FAMILIES[name], folder, scan=True)
    jax.tree.map(np.testing.assert_array_equal, apart.model.params, unstacked(together.model.params))
    ids = io["forward/input_ids"][:1]
    np.testing.assert_allclose(together.logits(ids, Causal()), apart.logits(ids, Causal()), rtol=0, atol=TOLERANCE)


def test_what_a_config_asks_that_we_do_not_have_is_refused_by_name():
    folder, _ = folder_of("llama")
    for changes, cause in [
        ({"hidden_act": "swish"}, "hidden_act='swish'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 3}}, "mscale=3"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0, which isn't implemented"),
        ({"hidden_size": 0}, "hidden_size=0"),
    ]:
        with pytest.raises(ValueError, match=cause):
            Loaded(llama, folder, changes)
