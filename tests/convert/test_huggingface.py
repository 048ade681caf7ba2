"""Safetensors and Hugging Face folders: written, read back here and by the safetensors package; damage is one line."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from diffusion_lm.convert import huggingface
from diffusion_lm.convert.huggingface import open_folder, read_header, write_file, write_folder

CONFIG = {"model_type": "llama"}


def arrays():
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "a": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "odd": np.arange(3, dtype=np.uint8),
        "none": np.zeros((0, 4), np.float16),
        "one": np.array(2.5, np.float64),
    }


def same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def test_what_is_written_is_read_back_here_and_by_the_package(tmp_path):
    write_file(tmp_path / "x.safetensors", arrays())
    ours, theirs = read_header(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys() == arrays().keys()
    for name, array in arrays().items():
        same(ours[name].read(), array)
        same(theirs[name], array)


def test_the_packages_files_are_read(tmp_path):
    save_file(dict(arrays()), tmp_path / "x.safetensors")
    for name, info in read_header(tmp_path / "x.safetensors").items():
        same(info.read(), arrays()[name])


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, None), slice(3, 3), slice(None)])
def test_some_rows_are_those_rows(tmp_path, rows):
    write_file(tmp_path / "x.safetensors", arrays())
    same(read_header(tmp_path / "x.safetensors")["b.weight"].read(rows), arrays()["b.weight"][rows])


@pytest.mark.parametrize("shard_bytes", [1, 70, 10**9])
def test_a_folder_in_shards_of_any_size_comes_back(tmp_path, shard_bytes):
    write_folder(tmp_path / "out", CONFIG, arrays().items(), {"tokenizer.json": b"{}"}, shard_bytes)
    found = open_folder(tmp_path / "out")
    assert found.config == CONFIG and found.companions == {"tokenizer.json": b"{}"} and found.generation == {}
    assert found.tensors.keys() == arrays().keys()
    for name, array in arrays().items():
        same(found.tensors[name].read(), array)
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 10**9)
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(a.nbytes for a in arrays().values())


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def tensors():
        yield from arrays().items()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_folder(tmp_path / "out", CONFIG, tensors(), {}, 70)
    assert not (tmp_path / "out").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(FileExistsError, match="holds something"):
        write_folder(tmp_path / "used", CONFIG, arrays().items(), {})


def folder(path, shard_bytes=70):
    write_folder(path, CONFIG, arrays().items(), {}, shard_bytes)
    return path


def _without_index_entry(path):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["a"]
    index.write_text(json.dumps(content))


def _with_missing_tensor(path):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))


def _without_shard(path):
    next(path.glob("model-*.safetensors")).unlink()


def _outside(path):
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))


def _truncated(path):
    shard = max(path.glob("model-*.safetensors"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])


def _longer(path):
    shard = next(path.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (_without_index_entry, "which model.safetensors.index.json looks for in None"),
        (_with_missing_tensor, "names more, which is in no file"),
        (_without_shard, "which is not in the folder"),
        (_outside, "which is not in the folder"),
        (_truncated, "doesn't lie where it says"),
        (_longer, "behind the last tensor"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("[]"), "no JSON object"),
        (lambda path: (path / "config.json").write_text("{"), "is no JSON"),
        (lambda path: (path / "model.safetensors.index.json").unlink(), "no model.safetensors.index.json"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, damage, cause):
    damage(folder(tmp_path / "x"))
    with pytest.raises((ValueError, FileNotFoundError), match=cause) as raised:
        open_folder(tmp_path / "x")
    assert "\n" not in str(raised.value)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pickles only"):
        open_folder(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_header_is_read_or_refused_and_nothing_large_is_allocated(tmp_path_factory, data):
    """Bytes of a good file changed, cut off, or replaced by absurd numbers."""
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_file(file, arrays())
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["bytes", "cut", "length", "json"]))
    if kind == "bytes":
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind == "length":
        content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    else:
        numbers = st.one_of(st.integers(-(2**70), 2**70), st.none(), st.text(max_size=3), st.floats(allow_nan=True))
        entry = {
            "dtype": data.draw(st.sampled_from(["F32", "BF16", "X", 3])),
            "shape": data.draw(st.lists(numbers, max_size=3)),
            "data_offsets": data.draw(st.lists(numbers, max_size=3)),
        }
        text = json.dumps({"a": entry}).encode()
        content = len(text).to_bytes(8, "little") + text
    file.write_bytes(bytes(content))
    try:
        found = huggingface.read_header(file)
    except ValueError as error:
        assert "\n" not in str(error) and str(file) in str(error)
    else:
        assert sum(info.nbytes for info in found.values()) <= len(content)
        for info in found.values():
            info.read()
