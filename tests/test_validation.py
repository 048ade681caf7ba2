"""What is refused before a run starts: attention kernels that the devices don't have."""

import dataclasses

import jax
import pytest
from support.commands import SMALL, call

from diffusion_lm import sharding
from diffusion_lm.config import load, override
from diffusion_lm.validation import check_kernel, runnable
from launch import compile as compiling
from launch import train

KERNELS = {"splash": "TPUs", "cudnn": "NVIDIA's GPUs"}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_of_other_devices_is_one_line_before_anything_is_built(kernel, tmp_path, capsys, mesh):
    """The text isn't even there."""
    settings = (
        *SMALL,
        f"exec.attention_kernel={kernel}",
        f"data.path={tmp_path}/missing.txt",
        "exec.compute_dtype=bfloat16",
    )
    flags = f"--workdir={tmp_path}/work", *(f"--set={s}" for s in settings)
    status, out, err = call(capsys, train, "--config=configs/tinyshakespeare.py", *flags)
    cause = (
        f"exec.attention_kernel={kernel} is for {KERNELS[kernel]} and this runs on cpu: set exec.attention_kernel=auto"
    )
    assert (status, out, err) == (2, "", f"error: {cause}\n")


@pytest.mark.parametrize("kernel", [*KERNELS, "chunked", "auto"])
def test_a_run_of_other_devices_can_be_loaded_here(kernel, mesh):
    config = override(load("configs/tinyshakespeare.py"), [f"exec.attention_kernel={kernel}"])
    here = runnable(config, mesh)
    assert here.exec.attention_kernel == ("auto" if kernel in KERNELS else kernel)
    assert dataclasses.replace(here, exec=config.exec) == config
    check_kernel(here, mesh)


def test_compile_refuses_it_too(capsys, monkeypatch):
    monkeypatch.setattr(
        compiling.topologies, "of", lambda *_: compiling.topologies.Topology(devices=jax.devices(), memory=0)
    )
    flags = "--config=configs/tinyshakespeare.py", "--topology=cpu:1", "--set=exec.attention_kernel=splash"
    status, out, err = call(capsys, compiling, *flags)
    assert (status, out) == (2, "") and err.startswith("error: exec.attention_kernel=splash is for TPUs")
