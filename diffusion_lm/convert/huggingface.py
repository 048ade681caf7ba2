"""Hugging Face folders: config.json, and safetensors in one file or in shards, read tensor by tensor and written.

No pickle is opened and no code of a repository is run. A file is read by offset and not mapped into memory, so that the
memory of a load is the model's and one tensor's: pages of a mapped file would count beside the arrays made of them.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffusion_lm import files
from diffusion_lm.models.weights import aligned

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes: the format's own limit
_SHARD_BYTES = 5_000_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: its file, its first byte there, its dtype and shape."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some of its first axis, in memory of its own. OSError where the file ends early."""
        start, stop, step = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        if step != 1:
            raise ValueError(f"rows are read one after the other, not every {step}th")
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        each = self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0
        found = aligned(shape, self.dtype)
        view = memoryview(found.reshape(-1).view(np.uint8))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset + start * each)
            while view:
                read = file.readinto(view)
                if not read:
                    raise OSError(f"{self.file} ends before its tensors do: fetch it again")
                view = view[read:]
        return found


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. ValueError with one line for a header that can't be, before anything of the
    size that it claims is allocated."""
    size = file.stat().st_size

    def bad(why: str) -> ValueError:
        return ValueError(f"{file} is no whole safetensors file ({why}): fetch it again")

    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise bad(f"a header of {length} bytes in a file of {size}")
        text = opened.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {name: _entry(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UnicodeDecodeError) as error:
        raise bad(f"its header can't be read, {type(error).__name__}") from None
    tensors, end = {}, 0
    for name, (dtype, shape, start, stop) in sorted(found.items(), key=lambda item: item[1][2:]):
        if start != end or stop - start != dtype.itemsize * math.prod(shape) or 8 + length + stop > size:
            raise bad(f"{name} doesn't lie where it says")
        tensors[name] = TensorInfo(file=file, offset=8 + length + start, dtype=dtype, shape=shape)
        end = stop
    if 8 + length + end != size:
        raise bad(f"{size - 8 - length - end} bytes behind the last tensor")
    return tensors


def _entry(entry: Mapping) -> tuple[np.dtype, tuple[int, ...], int, int]:
    dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or len(shape) > 32:
        raise ValueError
    return dtype, shape, start, stop


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Somebody's weights: what Hugging Face calls them and how they are read.

    config      config.json as it stands there
    tensors     name -> a tensor that can be read in part (`read(rows)`, `shape`, `dtype`)
    companions  other files that belong to it, by name: the tokenizer's, generation_config.json, the chat template
    generation  generation_config.json, or {}
    """

    source: Path
    config: dict[str, Any]
    tensors: Mapping[str, Any]
    companions: dict[str, bytes]

    @property
    def generation(self) -> dict[str, Any]:
        found = self.companions.get("generation_config.json")
        return {} if found is None else parse_json(found, f"{self.source}/generation_config.json")


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object. ValueError with one line otherwise."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds no JSON object: fetch it again")
    return found


def open_folder(folder: Path | str) -> Checkpoint:
    """A folder with config.json and safetensors. Raises FileNotFoundError or ValueError with one line."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no Hugging Face folder")
    config = parse_json((folder / "config.json").read_bytes(), f"{folder}/config.json")
    companions = {name: (folder / name).read_bytes() for name in _COMPANIONS if (folder / name).is_file()}
    return Checkpoint(source=folder, config=config, tensors=_tensors(folder), companions=companions)


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in files:
        files = [folder / "model.safetensors"]
    if len(files) > 1:
        raise ValueError(
            f"{folder} has {len(files)} safetensors files and no model.safetensors.index.json that says which"
        )
    if not files:
        pickles = [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
        if pickles:
            raise ValueError(f"{folder} has pickles only ({pickles[0]}), which can run code: save it as safetensors")
        raise FileNotFoundError(f"{folder} has no safetensors file")
    return read_header(files[0])


def _indexed(folder: Path, index: Path) -> dict[str, TensorInfo]:
    places = parse_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files: fetch it again")
    found: dict[str, TensorInfo] = {}
    for name in sorted(set(places.values())):
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not in the folder: fetch it")
        for tensor, info in read_header(file).items():
            if places.get(tensor) != name:
                raise ValueError(f"{file} holds {tensor}, which {index.name} looks for in {places.get(tensor)}")
            found[tensor] = info
    if missing := sorted(places.keys() - found.keys()):
        raise ValueError(f"{index} names {missing[0]}, which is in no file" + _and_more(missing))
    return found


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def write_folder(
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    companions: Mapping[str, bytes],
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """A new folder with config.json, shards of at most `shard_bytes` with their index, and companions unchanged.

    Tensors are taken one after the other: a shard and no more is held. Raises FileExistsError for a folder that holds
    anything. What fails leaves no folder behind.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: name a new folder")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        names = _write_shards(folder, tensors, shard_bytes)
        total = sum(size for _, size in names.values())
        if len({file for file, _ in names.values()}) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": {name: file for name, (file, _) in names.items()}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name, content in companions.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except BaseException:
        for file in folder.iterdir():
            file.unlink()
        if made:
            folder.rmdir()
        raise


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> dict[str, tuple[str, int]]:
    """name -> (file, bytes)."""
    shards: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        write_file(folder / f"shard-{len(shards) + 1}", held)
        shards.append({name: array.nbytes for name, array in held.items()})
        held.clear()

    for name, array in tensors:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > shard_bytes:
            flush()
        held[name] = array
    flush()
    found = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{i}", folder / file)
        found |= {name: (file, size) for name, size in shard.items()}
    return found


def write_file(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file: widest dtypes first, then by name, so that every tensor is aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        array = tensors[name]
        offsets = [at, at + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.named(file), open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            opened.write(
                np.ascontiguousarray(tensors[name]).view(np.uint8).data
                if tensors[name].ndim
                else tensors[name].tobytes()
            )
