"""launch.compile: whether a config fits devices that aren't present."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from launch import compile as compiling

ROOT = Path(__file__).parents[2]
GOLDEN = {
    "all-gather": {"places": 40, "runs": 40, "bytes": 399_360},
    "all-reduce": {"places": 28, "runs": 28, "bytes": 3_400_872},
    "collective-permute": {"places": 2, "runs": 2, "bytes": 12_288},
}
GOLDEN_ALONG = {
    "all-gather": {"places": 51, "runs": 51, "bytes": 467_968},
    "all-reduce": {"places": 15, "runs": 15, "bytes": 369_648},
    "all-to-all": {"places": 17, "runs": 17, "bytes": 131_072},
    "collective-permute": {"places": 18, "runs": 18, "bytes": 118_789},
}
CONSTRAINTS = 26  # in the text before compilation: fewer are layouts that nobody asks for any more
SMALL = ("model.width=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.mlp_dim=64", "data.seq_len=32",
         "data.vocab_size=300", "train.batch_size=16", "objective.block_size=8")  # fmt: skip


def launch(*arguments: str, settings=()) -> subprocess.CompletedProcess:
    flags = ["--config=configs/base_125m.py", *arguments, *(f"--set={s}" for s in (*SMALL, *settings))]
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-m", "launch.compile", *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def compiled(*arguments: str, settings=()) -> dict:
    done = launch(*arguments, settings=settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_an_update_on_eight_cpu_devices(tmp_path):
    mesh = ("mesh.fsdp=4", "mesh.tensor=2")
    found = compiled(
        "--topology=cpu:8", "--chip_gib=1", f"--out={tmp_path}/out.json", "--batch_size=128", settings=mesh
    )
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert (found["chips"], found["mesh"], found["fits"]) == (8, {"fsdp": 4, "tensor": 2}, True)
    size = found["bytes"]
    assert size["optimizer"] == pytest.approx(2 * size["parameters"], abs=100)  # AdamW's two moments, and counts
    assert size["total"] >= size["parameters"] + size["optimizer"] + size["temporaries"]
    assert found["flops"] > 0 and len(found["largest_temporaries"]) == 8
    # jax 0.10.2. More places are a layout that was lost on the way; more runs or bytes, a sum that moved into a loop
    # (the table's gradient is to be summed after those of the loss, which depend on the weights and count as one).
    assert found["collectives"] == GOLDEN
    assert found["constraints"] == CONSTRAINTS


@pytest.mark.cases(0)
def test_an_update_whose_rows_are_cut_along_their_length():
    """Eight devices share one row. Gathered are weights, keys and values; queries are dealt out and what they found is
    handed back; the gradients of keys and values are summed once a layer. Without the constraints nothing would move.
    """
    settings = ("mesh.fsdp=1", "mesh.sequence=8", "train.grad_accum_steps=1", "data.seq_len=256")
    found = compiled("--topology=cpu:8", "--batch_size=1", settings=settings)
    assert found["mesh"] == {"sequence": 8}
    assert found["collectives"] == GOLDEN_ALONG
    assert found["constraints"] == CONSTRAINTS


@pytest.mark.cases(0)
def test_a_generation_on_eight_cpu_devices():
    mesh = ("mesh.data=4", "mesh.fsdp=1", "mesh.tensor=2")
    found = compiled("--topology=cpu:8", "--what=sample", "--batch_size=4", "--denoising_steps=2", settings=mesh)
    assert found["fits"] is None  # nobody knows this machine's memory
    cache = 2 * 2 * 1 * 1 * 32 * 8 * 2  # layers, keys and values, rows and heads of a device, slots, width, bfloat16
    assert found["bytes"]["cache"] == cache + 4  # and a length


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("arguments", "settings", "cause"),
    [
        (["--topology=v9:2x2"], (), "give cpu:COUNT, or chips along each side of a v4, v5e, v5p, v6e"),
        (["--topology=cpu:8", "--num_slices=2"], (), "in one slice"),
        (["--topology=cpu:8", "--bisect"], (), "the memory of cpu:8 is unknown"),
        (["--topology=cpu:8"], ("train.batch_size=12",), "can't be divided among 8 devices"),
    ],
)
def test_bad_input_is_one_line(arguments, settings, cause):
    done = launch(*arguments, settings=settings)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert cause in done.stderr


@pytest.mark.parametrize("each", [2, 3, 7.5, 100, 249, 251])
@pytest.mark.parametrize("known", [{}, {4: 4}, {64: 64}])
def test_the_largest_that_fits_is_found_in_few_tries(each, known):
    asked = []

    def size(n):
        asked.append(n)
        return 50 + each * n

    found = compiling.largest(size, 300, {n: size(n) for n in known})
    assert found == int(250 // each)
    assert len(asked) <= compiling.TRIES and len(set(asked)) == len(asked)


tpus = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install '.[aot]'")


@tpus
def test_an_update_on_tpus_that_are_not_there():
    found = compiled("--topology=v5e:2x2")
    assert found["fits"] and found["chips"] == 4
    # Forward, forward anew, and backward to queries and to keys and values, in each of two layers.
    assert sorted(found["kernels"].values()) == [2, 2, 4] and all("splash" in name for name in found["kernels"])
    small = compiled("--topology=v5e:2x2", "--num_slices=2", settings=("mesh.data=2", "exec.attention_kernel=chunked"))
    assert small["chips"] == 8 and small["mesh"] == {"data": 2, "fsdp": 4} and not small["kernels"]


@tpus
def test_a_row_cut_along_its_length_reaches_the_kernel_in_parts():
    """Each chip has its part of the queries' squares, and all keys."""
    settings = "mesh.fsdp=1", "mesh.sequence=4", "train.grad_accum_steps=1", "data.seq_len=256"
    found = compiled("--topology=v5e:2x2", "--batch_size=1", settings=settings)
    assert found["fits"] and found["kernels"]


def test_what_a_public_models_config_asks_for(shared):
    """Its config.json alone: no weights are at hand."""
    config = shared / "parity/llada/config.json"
    flags = [f"--config={config}", "--topology=cpu:2", "--what=sample", "--batch_size=2", "--denoising_steps=2"]
    command = [sys.executable, "-m", "launch.compile", *flags, "--set=data.seq_len=64"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["bytes"]["parameters"] > 0


_ONE = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())


class _Full:
    """A program for which the compiler finds no room."""

    def __init__(self, message: str):
        self.message = message

    jitted = property(lambda self: self)
    arguments = {"parameters": jax.ShapeDtypeStruct((1000,), "int8", sharding=_ONE)}  # noqa: RUF012
    flops = 1
    lower = lambda self, *arguments: self  # noqa: E731
    as_text = lambda self: ""  # noqa: E731

    def compile(self):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.message}")


@pytest.mark.parametrize(
    ("message", "total"),
    [
        ("Ran out of memory in memory space hbm. Used 34.80G of 15.75G hbm.", int(34.8 * 2**30)),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (2.50M) exceeds", 2_621_440 + 1000),
        ("no figure", 0),
    ],
)
def test_what_a_program_needs_that_does_not_fit(message, total):
    found = compiling.examine(_Full(message), memory=2**34)
    assert found["fits"] is False and found["bytes"]["total"] == total
