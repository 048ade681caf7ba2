"""Run with eight CPU devices: meshes against one device. The arguments are meshes, as in 'data=2,sequence=4', or
'kernel' for TPUs' attention, interpreted, and GPUs', replaced, or 'int8' for products of such factors; none: all 35
meshes that there are of five axes.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu PYTHONPATH=. python tests/meshes.py

A joint model of two layers, with experts on meshes that cut them: three updates, then a few canvases written behind
prompts. Each mesh must give one device's losses (2e-6), parameters (1e-5) and tokens.
"""

import dataclasses
import functools
import itertools
import math
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm import sharding
from diffusion_lm.attention_patterns import BlockDiffusionTraining, Causal
from diffusion_lm.build import LoadedModel, build_init, build_job, build_loss, build_model
from diffusion_lm.config import Config, Data
from diffusion_lm.data import loader
from diffusion_lm.data.corpora import Texts
from diffusion_lm.data.tokenizer import SentencePiece, train_tokenizer
from diffusion_lm.inference import presets
from diffusion_lm.models.base import DenoiserSpec, Execution
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from diffusion_lm.nn import attention, cudnn, lm_head, splash
from diffusion_lm.nn.cache import LayerKV
from diffusion_lm.nn.dot import dot
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.sharding import MeshShape
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import Muon

MODEL = DenoiserSpec(width=32, layers=2, heads=8)
MIXED = dataclasses.replace(MODEL, mlp_dim=16, num_experts=8, num_experts_per_token=2)
DOCUMENTS = tuple(f"a line of text, number {i}, and some more of it" for i in range(200))
TOKENIZER = train_tokenizer(DOCUMENTS, vocab=400, kind="char")
TOKENS = loader.tokenize(Texts(texts=DOCUMENTS), TOKENIZER, pad=7)


class InMemory(NamedTuple):
    """A `data.source.TokenizedData` of tokens that are there already."""

    tokenizer: SentencePiece
    tokens: loader.TokenArray
    fingerprint: str = ""

    def train_batches(self, **how):
        return loader.train_loader(self.tokens, **how)

    def valid_batches(self, **how):
        return loader.eval_batches(self.tokens, **how)


def config_of(model: DenoiserSpec, shape: MeshShape) -> Config:
    return Config(
        data=Data(path="none", seq_len=32), model=model, exec=Execution(compute_dtype="float32"), process=Absorbing(),
        objective=Joint(block_size=8), optim=Muon(), mesh=shape, train=Train(batch_size=8, steps=3),
    )  # fmt: skip


def trained(model: DenoiserSpec, shape: MeshShape, mesh):
    """Three updates: the losses, the parameters, and how many of them the mesh cuts."""
    config = config_of(model, shape)
    module, process = build_model(config, TOKENIZER)
    text, loss = InMemory(TOKENIZER, TOKENS), build_loss(config, module, process)
    job = build_job(config, text, mesh, loss, loss, build_init(module, process), {})
    state, losses = job.initial(), []
    for _ in range(3):
        batch = jax.tree.map(lambda x: x[None], next(job.batches))
        state, metrics = job.step(state, job.key, job.put(batch), {})
        losses.append(float(metrics["loss"][0]))
    cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    return losses, jax.device_get(state.params), cut


@functools.cache
def single(model: DenoiserSpec):
    """On one device: losses, parameters, louder ones, and what is written with those."""
    shape, mesh = MeshShape(), sharding.make_mesh(MeshShape(), jax.devices()[:1])
    losses, params, _ = trained(model, shape, mesh)
    rng = np.random.default_rng(0)
    loud = jax.tree.map(lambda a: a + rng.normal(scale=0.3, size=a.shape).astype("f4"), params)
    tokens = written(loud, model, shape, mesh)
    assert len(np.unique(tokens)) > 8, tokens
    return losses, params, loud, tokens


def written(params, model: DenoiserSpec, shape: MeshShape, mesh):
    """What a network with these parameters writes behind eight prompts."""
    config = config_of(model, shape)
    module, process = build_model(config, TOKENIZER)
    asked = LoadedModel(config, TOKENIZER, process, network=None, step=0, meta=None, prepared={})
    writer = presets.confidence(asked, sampling=SamplingParams(), canvas_length=0, denoising_steps=3)
    bound = BoundModel(module=module, params=params).for_sampling()
    boxed = jax.eval_shape(functools.partial(init_params, bound.module), jax.random.key(0))
    rows = sharding.batch_sharding(mesh)
    prompt = Prompt(tokens=jnp.arange(40, dtype=jnp.int32).reshape(8, 5) + 4, length=jnp.full(8, 5, jnp.int32))
    cache = bound.empty_cache(8, writer.slots(5, 16))
    arguments = (
        bound.replace(params=jax.device_put(bound.params, sharding.state_shardings(mesh, boxed))),
        jax.device_put(cache, sharding.cache_shardings(mesh, cache)),
        jax.device_put(prompt, rows),
        jax.device_put(jax.random.split(jax.random.key(3), 8), rows),
    )
    write = sharding.on(mesh, functools.partial(writer.generate, max_new_tokens=16))
    return jax.device_get(jax.jit(write)(*arguments).tokens)


def check_kernel() -> None:
    """Splash attention whose rows are cut, and cuDNN's with plain XLA in the kernel's place, in documents, against
    chunks on one device: forward and backward."""
    cudnn.platform, cudnn._fused = lambda: "gpu", functools.partial(jax.nn.dot_product_attention, implementation="xla")
    splash._SQUARE, length, rng = 128, 145, np.random.default_rng(0)
    shapes = (4, 4, 2 * length, 6), (4, 2, 6, 2 * length), (4, 2, 2 * length, 6), (4, 4, 2 * length, 6)
    at = np.arange(length)
    segment_ids = np.stack([np.zeros_like(at), np.minimum(at // 61, 2)] * 2).astype(np.int32)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def both(by, segment_ids, q, k, v, g):
        def read(q, k, v):
            ranges = pattern.key_ranges(length, segment_ids)
            return attention.dot_product_attention(
                q, LayerKV(k=k, v=v), pattern, ranges, compute_dtype="float32", kernel=by
            )

        found, back = jax.vjp(read, q, k, v)
        return found, *back(g)

    pattern = BlockDiffusionTraining(5, Causal())
    expected = jax.jit(functools.partial(both, "chunked"))(segment_ids, *arrays)
    cut_rows, whole_rows = MeshShape(data=2, sequence=2, tensor=2), MeshShape(data=2, fsdp=2, tensor=2)
    for by, shape, off in (("splash", cut_rows, 1e-5), ("cudnn", whole_rows, 3e-4)):
        mesh = sharding.make_mesh(shape)
        many = jax.device_put((segment_ids, *arrays), sharding.replicated(mesh))
        found = jax.jit(sharding.on(mesh, functools.partial(both, by)))(*many)
        assert not any(a.sharding.is_fully_replicated for a in found)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=off, rtol=0), found, expected)


def check_int8() -> None:
    """Products of int8 factors, cut along what is summed and along what isn't: to the bit those of one device."""
    mesh, rng = sharding.make_mesh(MeshShape(data=1, fsdp=2, tensor=4)), np.random.default_rng(0)
    for spec, *named in (
        ("ble,ehd->blhd", ("batch", None, None), ("embed", "heads", None)),
        ("blm,me->ble", ("batch", None, "mlp"), ("mlp", "embed")),
    ):
        shapes = [tuple(8 if index in "bhme" else 4 for index in part) for part in spec.split("->")[0].split(",")]
        factors = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
        multiply = functools.partial(dot, spec, quantization="int8")
        cut = sharding.state_shardings(mesh, list(map(nn.LogicallyPartitioned, factors, named)))
        assert not any(one.is_fully_replicated for one in cut)
        found = jax.jit(sharding.on(mesh, multiply))(*jax.device_put(factors, cut))
        np.testing.assert_array_equal(found, jax.jit(multiply)(*factors), err_msg=spec)


def every() -> list[str]:
    """All ways to make eight of five axes."""
    sizes = itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES))
    made = [zip(sharding.AXES, size, strict=True) for size in sizes if math.prod(size) == 8]
    return [",".join(f"{axis}={size}" for axis, size in mesh if size > 1) for mesh in made]


def main() -> None:
    jax.config.update("jax_debug_key_reuse", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)  # half of the time, otherwise
    attention._CHUNK, attention._WINDOWS, lm_head._CHUNK_ROWS = 4, 2, 16  # several turns of every loop
    for name in sys.argv[1:] or every():
        if name in ("kernel", "int8"):
            {"kernel": check_kernel, "int8": check_int8}[name]()
            print(name, flush=True)
            continue
        sizes = dict(part.split("=") for part in name.split(","))
        shape = MeshShape(**{"data": 1} | {axis: int(size) for axis, size in sizes.items()})
        mesh = sharding.make_mesh(shape)
        model = MIXED if "expert" in sizes else MODEL
        losses, params, loud, tokens = single(model)
        many, others, cut = trained(model, shape, mesh)
        assert cut > 1 or set(sizes) == {"data"}, (name, cut)
        np.testing.assert_allclose(many, losses, atol=2e-6, rtol=0, err_msg=name)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0, err_msg=name), others, params)
        np.testing.assert_array_equal(written(loud, model, shape, mesh), tokens, err_msg=name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
