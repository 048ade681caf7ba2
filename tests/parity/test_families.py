"""Public families: our network computes what each family's own code did from the same tensors, and gives them back."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import parity

from diffusion_lm.attention_patterns import BlockCausal, Causal, Full
from diffusion_lm.convert.huggingface import open_folder
from diffusion_lm.models import family_index, gpt2, llada2, llama
from diffusion_lm.models.base import Execution
from diffusion_lm.models.bound_model import BoundModel, unstacked
from diffusion_lm.models.family import ConfigReader, stacked
from diffusion_lm.models.family_index import family_of, named
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.models.weights import check_names, load_parameters, write_tensors

FAMILIES = {family.__name__.rsplit(".")[-1]: family for family in family_index.FAMILIES} | {"llada21": llada2}
CAUSAL = ("llama", "qwen2", "qwen3", "gpt2", "gemma3", "ministral3", "qwen3_moe")
TOLERANCE = 3e-4


class Loaded:
    """The network of a folder, float32, its layers apart."""

    def __init__(self, family, folder, changes=None, scan=False):
        self.source = open_folder(folder)
        self.tensors = named(family, self.source.tensors)
        reader = ConfigReader(self.source.config | (changes or {}), f"{folder}/config.json")
        self.spec = family.describe(reader).spec
        reader.finish()
        self.leaves = family.leaves(self.spec)
        check_names(str(folder), self.tensors, self.leaves, family.is_buffer)
        execution = Execution(compute_dtype="float32")
        module = Transformer(spec=self.spec, exec=execution, vocabulary=self.spec.vocabulary, scan=scan)
        abstract = nn.meta.unbox(jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0)))
        leaves = stacked(self.leaves, self.spec) if scan else self.leaves
        self.model = BoundModel(module=module, params=load_parameters(leaves, self.tensors, abstract))

    def logits(self, ids, attention, positions=None, segment_ids=None):
        """float32 [B, L, V]: of each position as the network computes them."""
        ids = jnp.asarray(ids, jnp.int32)
        index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
        positions = index if positions is None else jnp.asarray(positions, jnp.int32)
        segment_ids = jnp.ones_like(ids) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        t = jnp.zeros((len(ids), 1))
        head = self.model.denoise(ids, t, attention=attention, positions=positions, segment_ids=segment_ids)
        return np.asarray(head.logits())

    def close(self, found, expected, where=None):
        """Within the tolerance, but for ids that are never predicted."""
        here = np.setdiff1d(np.arange(found.shape[-1]), self.spec.vocabulary.never)
        assert np.isneginf(found[..., list(self.spec.vocabulary.never)]).all()
        difference = np.abs(found[..., here] - expected[..., here])
        assert (difference if where is None else difference[where]).max() < TOLERANCE


def folder_of(name):
    return parity.folder(name), parity.arrays(name)


@pytest.fixture(params=FAMILIES)
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
