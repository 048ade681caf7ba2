"""Devices to compile for that needn't be present: TPU slices, or any number of CPU devices."""

import dataclasses
import os

import jax
from jax.experimental import topologies

GIB = 2**30
# GiB a chip by specification; the compiler reserves a little of it.
MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """devices: one a chip. memory: bytes of a chip, 0 if unknown."""

    devices: list
    memory: int


def of(name: str, slices: int) -> Topology:
    """The topology named v5e:4x4 (chips along each side; v4 and v5p have three) or cpu:8.

    It must be called before JAX initializes its backends. Raises ValueError for an unknown name, or without libtpu.
    """
    kind, _, sizes = name.partition(":")
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        if not sizes.isdecimal() or not int(sizes) or slices != 1:
            raise ValueError(f"--topology={name} --num_slices={slices}: CPU devices are named cpu:8, in one slice")
        try:
            jax.config.update("jax_num_cpu_devices", int(sizes))
        except RuntimeError:
            raise ValueError(f"{name}: this process computes with JAX already; run launch.compile by itself") from None
        return Topology(devices=jax.devices(), memory=0)
    if kind not in MEMORY or not sizes:
        raise ValueError(f"--topology={name}: give cpu:COUNT, or chips along each side of a {', '.join(MEMORY)}")
    return Topology(devices=_tpus(name, slices), memory=MEMORY[kind] * GIB)


def _tpus(name: str, slices: int) -> list:
    # libtpu asks for these when it is loaded, and would look for a TPU machine otherwise.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    except (RuntimeError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"--topology={name}: {said} (without libtpu: pip install 'diffusion_lm[aot]')") from error
