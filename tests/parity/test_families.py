"""Public families: our network says what each family's own code computed, from the same tensors, and gives them back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.attention_patterns import BlockCausal, Causal, Full
from diffusion_lm.convert.huggingface import open_folder
from diffusion_lm.models import a2d_qwen3, dream, fastdllm_v2, llada, llama, qwen2, qwen3, sdar
from diffusion_lm.models.base import Execution
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.family import ConfigReader
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.models.weights import check_names, load_parameters, write_tensors

FAMILIES = {
    "llama": llama, "qwen2": qwen2, "qwen3": qwen3, "sdar": sdar, "dream": dream, "fastdllm_v2": fastdllm_v2,
    "llada": llada, "a2d_qwen3": a2d_qwen3,
}  # fmt: skip
TOLERANCE = 3e-4


def loaded(family, folder, config=None):
    """The network of a folder, float32, its layers apart."""
    source = open_folder(folder)
    reader = ConfigReader(config or source.config, f"{folder}/config.json")
    spec = family.describe(reader).spec
    reader.finish()
    leaves = family.leaves(spec)
    check_names(str(folder), source.tensors, leaves, family.is_buffer)
    module = Transformer(spec=spec, exec=Execution(compute_dtype="float32"), vocabulary=spec.vocabulary, scan=False)
    boxed = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), jax.tree.map(lambda a: a, nn_unbox(boxed)))
    return source, leaves, BoundModel(module=module, params=load_parameters(leaves, source.tensors, abstract))


def nn_unbox(boxed):
    import flax.linen as nn

    return nn.meta.unbox(boxed)
