"""GGUF files: what the gguf package writes is read in the hub's names and order of rows, and damage is one line."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lm.convert.gguf import open_gguf

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install -e '.[test]'")

HEADS, KV_HEADS, HEAD_DIM, WIDTH, MLP = 4, 2, 8, 32, 64
TOKENS = ["<|endoftext|>", "<|im_start|>", "a", "b", "ab", "1", "2", "Ġ"]


def permuted(w, heads):
    """The hub's order of rows (halves) as files of architecture llama have it (pairs of neighbours)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def written(path, architecture="llama", quantization=gguf.GGMLQuantizationType.F32):
    """A tiny file, and its tensors as the hub has them."""
    rng, writer = np.random.default_rng(1), gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    shapes = {
        "token_embd.weight": ("model.embed_tokens.weight", (len(TOKENS), WIDTH), 0),
        "output_norm.weight": ("model.norm.weight", (WIDTH,), 0),
        "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", (HEADS * HEAD_DIM, WIDTH), HEADS),
        "blk.0.attn_k.weight": ("model.layers.0.self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, WIDTH), KV_HEADS),
        "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", (WIDTH, MLP), 0),
    }
    hub = {}
    for name, (hub_name, shape, heads) in shapes.items():
        w = rng.normal(size=shape).astype(np.float32)
        stored = permuted(w, heads) if heads and architecture == "llama" else w
        kind = quantization if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(stored, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        back = gguf.quants.dequantize(packed, kind)
        if heads and architecture == "llama":
            back = back.reshape(heads, HEAD_DIM // 2, 2, -1).swapaxes(1, 2).reshape(shape)
        hub[hub_name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hub


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_have_the_hubs_names_and_rows(tmp_path, architecture, kind):
    hub = written(tmp_path / "x.gguf", architecture, gguf.GGMLQuantizationType[kind])
    found = open_gguf(tmp_path / "x.gguf")
    assert found.tensors.keys() == hub.keys()
    for name, array in hub.items():
        assert found.tensors[name].shape == array.shape
        np.testing.assert_array_equal(found.tensors[name].read(), array)
        np.testing.assert_array_equal(found.tensors[name].read(slice(1, 3)), array[1:3])


def test_the_config_is_the_hubs(tmp_path):
    written(tmp_path / "x.gguf")
    found = open_gguf(tmp_path / "x.gguf").config
    assert found["model_type"] == "llama" and found["tie_word_embeddings"] and found["vocab_size"] == len(TOKENS)
    assert found["rms_norm_eps"] == 1e-5 and found["rope_theta"] == 1e4 and found["head_dim"] == HEAD_DIM
    assert (found["num_attention_heads"], found["num_key_value_heads"]) == (HEADS, KV_HEADS)


def test_the_tokenizer_is_the_hubs(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    written(tmp_path / "x.gguf")
    companions = open_gguf(tmp_path / "x.gguf").companions
    tokenizer = tokenizers.Tokenizer.from_str(companions["tokenizer.json"].decode())
    assert tokenizer.encode("ab12 <|im_start|>").ids == [4, 5, 6, 7, 1]
    settings_ = json.loads(companions["tokenizer_config.json"])
    assert settings_["chat_template"] == "{{ messages }}" and settings_["bos_token"] == "<|im_start|>"


def test_what_is_not_known_is_refused_by_name(tmp_path):
    written(tmp_path / "x.gguf", "mamba")
    with pytest.raises(ValueError, match="of architecture mamba"):
        open_gguf(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "none.gguf")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    written(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        at = data.draw(st.integers(0, 700))
        count = data.draw(st.sampled_from([0, 1, 2**31, 2**40, 2**62, 2**64 - 1]))
        content[at : at + 8] = count.to_bytes(8, "little")
    path.write_bytes(bytes(content))
    try:
        found = open_gguf(path)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error)
    else:
        for tensor in found.tensors.values():
            tensor.read()


def test_a_length_in_the_head_is_believed_only_as_far_as_the_file_goes(tmp_path):
    """Each u64 of the head in turn says 2^40: no more is allocated than the file holds (it was once the machine)."""
    path = tmp_path / "x.gguf"
    written(path)
    whole = path.read_bytes()
    tracemalloc.start()
    for at in range(700):
        path.write_bytes(whole[:at] + (2**40).to_bytes(8, "little") + whole[at + 8 :])
        try:
            open_gguf(path)
        except ValueError as error:
            assert "\n" not in str(error)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("as_type", [None, 4, 6, 7])  # missing; or of type uint32, float32, bool
def test_each_value_that_is_missing_or_of_another_type_is_read_or_refused_in_one_line(tmp_path, as_type):
    path = tmp_path / "x.gguf"
    written(path)
    whole = path.read_bytes()
    names = [name for name in gguf.GGUFReader(path).fields if not name.startswith("GGUF.")]
    assert len(names) > 12
    for name in names:
        content = bytearray(whole)
        end = content.index(name.encode()) + len(name)
        if as_type is None:
            content[end - 1 : end] = b"?"
        else:
            content[end : end + 4] = as_type.to_bytes(4, "little")
        path.write_bytes(content)
        try:
            open_gguf(path)
        except ValueError as error:
            assert "\n" not in str(error)
