import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from support.small import module_of

from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.transformer import init_params
from diffusion_lm.sharding import AXES, RULES, MeshShape, cut, make_mesh, on, state_shardings

ROOT = Path(__file__).parents[1]


def test_the_rest_of_the_devices():
    assert MeshShape().sizes(8) == (8, 1, 1, 1, 1)
    assert MeshShape(data=1, fsdp=-1, tensor=2).sizes(8) == (1, 4, 1, 1, 2)
    assert MeshShape(data=2, sequence=2, tensor=2).sizes(8) == (2, 1, 1, 2, 2)


@pytest.mark.parametrize("shape", [MeshShape(data=2), MeshShape(data=-1, tensor=3), MeshShape(data=1, tensor=16)])
def test_a_mesh_that_does_not_use_the_devices_exactly(shape):
    with pytest.raises(ValueError, match=r"mesh.data=.*don't multiply to the 8 device\(s\) here; set one"):
        shape.sizes(8)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}])
def test_sizes_that_make_no_sense(sizes):
    with pytest.raises(ValueError, match="mesh: every axis must be positive"):
        MeshShape(**sizes)


def test_logical_constraints_reach_the_compiler():
    """They'd be silently dropped without the mesh in force."""

    def function(x):
        return nn.with_logical_constraint(x * 2, ("batch", "embed"))

    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    x = jnp.ones((2, 4))
    assert "sdy.sharding_constraint" in jax.jit(on(mesh, function)).lower(x).as_text()
    assert "sdy.sharding_constraint" not in jax.jit(function).lower(x).as_text()


def test_only_a_length_that_the_mesh_divides_is_cut():
    def function(x):
        return cut(x, "batch", "length", None)

    def lowered(length):
        mesh = jax.sharding.AbstractMesh((1, 1, 1, 4, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
        with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
            return str(jax.make_jaxpr(function)(jnp.ones((2, length, 3))))

    assert "), 'sequence'" in lowered(8) and "), 'sequence'" not in lowered(1)


def test_arrays_without_names_lie_whole_on_every_device():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    box = nn.LogicallyPartitioned
    tree = jax.eval_shape(lambda: {"a": jnp.ones(3), "b": box(jnp.ones((4, 2)), ("vocab", "embed"))})
    shardings = state_shardings(mesh, tree)
    assert shardings["a"].is_fully_replicated
    assert shardings["b"].spec == jax.sharding.PartitionSpec("tensor", ("fsdp", "sequence"))


def eight_devices(*arguments: str) -> subprocess.CompletedProcess:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PATH": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300, text=True)


def test_eight_devices_give_what_one_gives():
    """Losses and parameters of three updates, and tokens written: see `meshes`, which without arguments goes through
    all 35. These two have six of the ten pairs of axes. And TPUs' attention where rows are cut, and products
    of int8 factors."""
    meshes = ("data=2,fsdp=2,sequence=2", "fsdp=2,expert=2,tensor=2", "kernel", "int8")
    done = eight_devices("tests/support/meshes.py", *meshes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(meshes)


def test_more_devices_than_heads_are_refused():
    module = module_of(DenoiserSpec(width=32, layers=2, heads=4), 127)
    boxed = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    devices = jax.sharding.AbstractMesh((1, 1, 1, 1, 8), AXES)
    with pytest.raises(ValueError, match=r"mesh\.tensor=8 doesn't divide"):
        state_shardings(devices, boxed)
