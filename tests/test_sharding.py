import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from diffusion_lm.sharding import MeshShape, make_mesh, on, state_shardings

ROOT = Path(__file__).parents[1]


def test_the_rest_of_the_devices():
    assert MeshShape().sizes(8) == (8, 1, 1)
    assert MeshShape(data=1, fsdp=-1, tensor=2).sizes(8) == (1, 4, 2)
    assert MeshShape(data=2, fsdp=2, tensor=2).sizes(8) == (2, 2, 2)


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


def test_arrays_without_names_lie_whole_on_every_device():
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    box = nn.LogicallyPartitioned
    tree = jax.eval_shape(lambda: {"a": jnp.ones(3), "b": box(jnp.ones((4, 2)), ("vocab", "embed"))})
    shardings = state_shardings(mesh, tree)
    assert shardings["a"].is_fully_replicated
    assert shardings["b"].spec == jax.sharding.PartitionSpec("tensor", "fsdp")


EIGHT = """
import sys
sys.path.insert(0, {root!r})
import jax
import numpy as np
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
from diffusion_lm import sharding
from diffusion_lm.build import Text, build_job, build_loss, build_model
from diffusion_lm.config import Config, Data
from diffusion_lm.data.tokenizer import train_tokenizer
from diffusion_lm.data import loader
from diffusion_lm.data.corpora import Texts
from diffusion_lm.nn.denoiser import Architecture, init_params
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.sharding import MeshShape
from diffusion_lm.training.loop import Train

documents = ["a line of text, number %d, and some more of it" % i for i in range(200)]
tokenizer = train_tokenizer(documents, vocab=400, kind="char")
tokens = loader.tokenize(Texts(texts=tuple(documents)), tokenizer, pad=7)

def first_steps(shape, devices):
    config = Config(
        data=Data(path="none", length=32), process=Absorbing(), objective=BlockELBO(block=8), mesh=shape,
        model=Architecture(width=32, layers=2, heads=4, products="float32"), train=Train(batch=8, steps=3),
    )
    mesh = sharding.make_mesh(shape, jax.devices()[:devices])
    module, process = build_model(config, tokenizer)
    text = Text(tokenizer, tokens, tokens, "")
    job = build_job(config, text, mesh, build_loss(config, module, process), lambda key: init_params(module, key))
    state, losses = job.initial(), []
    for _ in range(2):
        batch = jax.tree.map(lambda x: x[None], next(job.batches))
        state, metrics = job.step(state, job.key, job.put(batch))
        losses.append(float(metrics["loss"][0]))
    cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    return losses, cut

one, _ = first_steps(MeshShape(), 1)
for shape in (MeshShape(data=2, fsdp=2, tensor=2), MeshShape(data=1, fsdp=8)):
    many, cut = first_steps(shape, 8)
    assert cut > 3, cut
    np.testing.assert_allclose(many, one, atol=2e-6, rtol=0)
try:
    first_steps(MeshShape(data=1, fsdp=1, tensor=8), 8)
except ValueError as error:
    assert "mesh.tensor=8" in str(error) and "doesn't divide" in str(error), error
else:
    raise AssertionError("4 heads on 8 devices")
"""


def test_eight_devices_on_two_meshes_give_the_loss_of_one():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    script = EIGHT.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
