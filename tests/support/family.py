"""A public family's network, as a folder of stored numbers holds it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.convert.huggingface import open_folder
from diffusion_lm.models.base import Execution
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.family import ConfigReader, stacked
from diffusion_lm.models.family_index import named
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.models.weights import check_names, load_parameters

TOLERANCE = 3e-4


@functools.partial(jax.jit, static_argnums=5)
def _logits(model, ids, t, positions, segment_ids, attention):
    return model.denoise(ids, t, attention=attention, positions=positions, segment_ids=segment_ids).logits()


class Loaded:
    """The network of a folder, float32, its layers apart."""

    def __init__(self, family, folder, changes=None, scan=False):
        self.source = open_folder(folder)
        self.tensors = named(family, self.source.tensors)
        reader = ConfigReader(self.source.config | (changes or {}), f"{folder}/config.json")
        self.described = family.describe(reader)
        self.spec = self.described.spec
        reader.finish()
        self.leaves = family.leaves(self.spec)
        check_names(str(folder), self.tensors, self.leaves, family.is_buffer)
        execution = Execution(compute_dtype="float32")
        module = Transformer(spec=self.spec, exec=execution, vocabulary=self.spec.vocabulary, scan=scan)
        abstract = nn.meta.unbox(jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0)))
        leaves = stacked(self.leaves, self.spec) if scan else self.leaves
        self.model = BoundModel(module=module, params=load_parameters(leaves, self.tensors, abstract))

    def logits(self, ids, attention, positions=None, segment_ids=None):
        """float32 [B, L, V]: of each position as the network computes them, at time 0."""
        ids = jnp.asarray(ids, jnp.int32)
        index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
        positions = index if positions is None else jnp.asarray(positions, jnp.int32)
        segment_ids = jnp.ones_like(ids) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        t = jnp.zeros((len(ids), 1))
        return np.asarray(_logits(self.model, ids, t, positions, segment_ids, attention))

    def close(self, found, expected, where=None):
        """Within the tolerance, but for ids that are never predicted."""
        here = np.setdiff1d(np.arange(found.shape[-1]), self.spec.vocabulary.never)
        assert np.isneginf(found[..., list(self.spec.vocabulary.never)]).all()
        difference = np.abs(found[..., here] - expected[..., here])
        assert (difference if where is None else difference[where]).max() < TOLERANCE
