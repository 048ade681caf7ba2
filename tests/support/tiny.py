"""A small random network that writes, for everything about writing that is not its distribution."""

import functools

import flax.linen as nn
import jax
import numpy as np

from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from support.small import module_of

VOCAB = MASK = 12
EOS = 11  # one that this network likes


@functools.cache
def model(layers: int = 1) -> BoundModel:
    """Float32 products, every parameter away from zero."""
    module = module_of(DenoiserSpec(width=16, layers=layers, heads=2, mlp_dim=16), VOCAB)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, module))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: np.asarray(a) + rng.normal(scale=0.4, size=a.shape).astype("f4"), params)
    return jax.tree.map(jax.numpy.asarray, BoundModel(module=module, params=params)).for_sampling()


def generated(network, text_sampler, prompt, length=10, seed=0):
    """What a text_sampler writes behind the prompts, in one program; network: with `empty_cache`."""
    keys = jax.random.split(jax.random.key(seed), len(prompt.length))

    @jax.jit
    def generate(network, keys):
        cache = network.empty_cache(len(prompt.length), text_sampler.slots(prompt.tokens.shape[1], length))
        return text_sampler.generate(network, cache, prompt, keys, max_new_tokens=length)

    return generate(network, keys)
