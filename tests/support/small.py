"""Small networks with every parameter away from zero, and rows to read."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.models.base import DenoiserSpec, Execution, ModelSpec, Vocabulary
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import Transformer, init_params

VOCAB = MASK = 11
SPECS = {
    "plain": DenoiserSpec(width=16, layers=2, heads=2, mlp_dim=24, qk_norm=False),
    "grouped, untied, timed": DenoiserSpec(
        width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=24, tie_embeddings=False, time_conditioning=True,
    ),
}  # fmt: skip


FLOAT32 = Execution(compute_dtype="float32")


def module_of(spec: ModelSpec, vocab: int = VOCAB, exec: Execution = FLOAT32, **more) -> Transformer:
    """A network of this many ids with the mask behind them."""
    return Transformer(spec, Vocabulary(size=vocab, mask=vocab), exec, **more)


@functools.cache
def boxed(spec: ModelSpec, vocab: int = VOCAB):
    module = module_of(spec, vocab)
    return jax.jit(functools.partial(init_params, module))(jax.random.key(0))


@functools.cache
def bound(spec: ModelSpec, vocab: int = VOCAB) -> BoundModel:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + rng.normal(scale=0.25, size=a.shape).astype("f4")),
        nn.meta.unbox(boxed(spec, vocab)),
    )
    return BoundModel(module=module_of(spec, vocab), params=params)


def rows(length: int, batch: int = 2, seed: int = 0, vocab: int = VOCAB) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(vocab, size=(batch, length)), jnp.int32)


def read(bound: BoundModel, tokens, attention, *, t=None, segment_ids=None, positions=None, length=None):
    """Logits (a pair for BlockDiffusionTraining)."""
    length = length or tokens.shape[1]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (tokens.shape[0], length))
    t = jnp.zeros((tokens.shape[0], 1)) if t is None else t
    return _read(bound, tokens, t, positions, segment_ids, attention)


@functools.partial(jax.jit, static_argnums=5)
def _read(bound, tokens, t, positions, segment_ids, attention):
    said = bound.denoise(tokens, t, attention=attention, positions=positions, segment_ids=segment_ids)
    return tuple(one.logits() for one in said) if isinstance(said, tuple) else said.logits()


@functools.partial(jax.jit, static_argnums=4)
def extend(bound, cache, tokens, count, attention):
    said, cache = bound.extend(cache, tokens, count, attention)
    return said.logits(), cache


denoise_canvas = jax.jit(lambda bound, cache, canvas, t: bound.denoise_canvas(cache, canvas, t))
