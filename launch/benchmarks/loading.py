"""The suite "loading": a synthetic checkpoint of Llama-3-8B's shapes, read from shards onto devices.

Each load has a process of its own, whose peak memory is read.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from diffusion_lm import sharding
from diffusion_lm.convert.huggingface import write_folder
from diffusion_lm.convert.loading import load_source
from diffusion_lm.models.family import ConfigReader
from diffusion_lm.models.family_index import family_of
from launch.benchmarks.timing import Row

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096,
    "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "bos_token_id": 128_000, "eos_token_id": 128_001, "torch_dtype": "bfloat16",
}  # fmt: skip
REPEATS = 3


def loading(layers: int) -> list[Row]:
    """Bytes a second beside `cat` of the same files, and the peak of memory; on one device, and on eight."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_synthetic(folder, CONFIG | {"num_hidden_layers": layers})
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        read, rows = [], []
        for devices in (1, 8):
            loaded = []
            for _ in range(REPEATS):
                _forget(files)
                begun = time.perf_counter()
                with open(os.devnull, "wb") as nowhere:
                    subprocess.run(["cat", *files], check=True, stdout=nowhere)
                read.append(time.perf_counter() - begun)
                _forget(files)
                loaded.append(_load(folder, devices))
            seconds, cat = statistics.median(found["seconds"] for found in loaded), statistics.median(read)
            peak, largest = (max(found[name] for found in loaded) for name in ("peak", "largest"))
            where = "one device" if devices == 1 else f"{devices} devices of one host"
            rows += [
                Row(
                    name=f"load onto {where}", value=size / seconds / 1e9, unit="GB/s", reference=size / cat / 1e9,
                    ratio=cat / seconds, target="ratio >= 0.5", note=f"{size / 1e9:.2f} GB; reference: cat",
                ),
                Row(
                    name=f"peak memory, {where}", value=peak / 1e9, unit="GB", ratio=peak / size,
                    target="<= 1.15 x the files", note=f"a device holds at most {largest / 1e9:.2f} GB",
                ),
            ]  # fmt: skip
        return rows


def _forget(files: list[Path]) -> None:
    """Drops the files' pages from the system's cache, so that they are read from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _load(folder: Path, devices: int) -> dict:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-c", f"from {__name__} import load; load({str(folder)!r}, {devices})"]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_synthetic(folder: Path, config: dict) -> None:
    """A folder as the hub has it: pseudorandom weights, a tokenizer of ASCII; a shard and no more is in memory."""
    import tokenizers

    family = family_of(config, str(folder))
    spec = family.describe(ConfigReader(config, str(folder))).spec
    shapes = {part.tensor: part.whole_shape for leaf in family.leaves(spec) for part in leaf.parts}
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            yield name, np.resize(noise, shape)

    letters = [chr(i) for i in range(32, 127)]
    vocab = {(letters[i] if i < len(letters) else f"t{i}"): i for i in range(config["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])).to_str().encode()
    write_folder(folder, config, tensors(), {"tokenizer.json": tokenizer})


def load(folder: str, devices: int) -> None:
    """What a process of its own does: loads, and prints seconds, peak memory and what a device holds at most."""
    mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=devices)) if devices > 1 else None
    begun = time.perf_counter()
    params = jax.block_until_ready(load_source(folder, mesh=mesh).network.params)
    seconds, held = time.perf_counter() - begun, {}
    for array in jax.tree.leaves(params):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "largest": max(held.values())}))
