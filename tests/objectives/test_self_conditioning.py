"""Self-conditioned training: what is read, what is told, and what gradients see."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small import module_of

from diffusion_lm.attention_patterns import Full
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from diffusion_lm.nn import lm_head as readout_module
from diffusion_lm.nn.lm_head import ChunkedLogits, LogitsSpec, unit
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.objectives.self_conditioning import SelfConditionedObjective
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.types import Alignment, Batch, DenseLogits, NoisyEmbeddings

VOCAB, LENGTH, ROWS, WIDTH = 7, 8, 3, 8
PROCESS = Uniform(mask=VOCAB)
SIZES = {"width": WIDTH, "layers": 1, "heads": 2, "mlp_dim": 8}


@functools.cache
def network() -> BoundModel:
    module = module_of(DenoiserSpec(**SIZES, self_conditioning=True), VOCAB)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, module))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(a + rng.normal(scale=0.3, size=a.shape), jnp.float32), params)
    return BoundModel(module=module, params=params)


def batch() -> Batch:
    tokens = jnp.asarray(np.random.default_rng(1).integers(VOCAB, size=(ROWS, LENGTH)), jnp.int32)
    at = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], tokens.shape)
    return Batch(tokens=tokens, segment_ids=jnp.ones_like(tokens), positions=at, context_mask=at == 0, loss_mask=at > 0)


def by_hand(objective, bound, key, again):
    """The objective with every noisy text read twice, the second time told what the first said if `again`."""

    def denoise(tokens, t, *, attention, **where):
        said = bound.denoise(tokens, t, attention=attention, **where)
        p = jax.nn.softmax(said[0].logits())
        self_cond = again * jax.lax.stop_gradient(p @ unit(bound.params["embedding"])[:VOCAB])
        return bound.denoise(
            tokens, t, attention=attention, self_cond=jnp.concatenate([self_cond, 0 * self_cond], axis=1), **where
        )

    return objective(denoise, PROCESS, key, batch())


def test_half_of_the_time_the_text_is_read_twice():
    """Value and gradients; what is told has none, and clean text is told nothing."""
    bound, objective, coins = network(), Joint(block_size=4), {}

    def total(params, seed, ours):
        key, asked = jax.random.key(seed), bound.replace(params=params)
        if ours:
            parts = SelfConditionedObjective(objective)(asked.denoise, PROCESS, key, batch())
        else:
            coin, key = jax.random.split(key)
            parts = by_hand(objective, asked, key, jax.random.bernoulli(coin))
        return sum(part.sum for part in parts.values())

    ours, theirs = (jax.jit(jax.value_and_grad(functools.partial(total, ours=own))) for own in (True, False))
    for seed in range(4):
        (value, gradients), (expected, wanted) = ours(bound.params, seed), theirs(bound.params, seed)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=2e-4), gradients, wanted)
        used = float(jnp.abs(gradients["self_conditioning"]["mlp"]["down"]).max()) > 0
        coins[used] = seed
    assert len(coins) == 2  # both sides of the coin were seen


def test_nothing_said_is_zeros():
    bound, rows = network(), batch()
    where = {"attention": Full(), "positions": rows.positions, "segment_ids": rows.segment_ids}
    t, self_cond = jnp.ones((ROWS, 1)), jnp.zeros((ROWS, LENGTH, WIDTH))
    one, other, told = (
        bound.denoise(rows.tokens, t, self_cond=s, **where).logits() for s in (None, self_cond, self_cond + 1)
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert float(jnp.abs(one - told).max()) > 0.1


def test_what_is_mixed_into_the_text_takes_the_tokens_place():
    """All of the token's vector and no noise is the token; none of it, the vector that is given."""
    module = module_of(DenoiserSpec(**SIZES, time_conditioning=True), VOCAB)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, module))(jax.random.key(0)))
    params["embedding"] = 30 * params["embedding"]  # away from the smallest size that a norm still sees
    bound, rows = BoundModel(module=module, params=params), batch()
    where = {"attention": Full(), "positions": rows.positions, "segment_ids": rows.segment_ids}
    t, keep, none = jnp.ones((ROWS, 1)), jnp.ones((ROWS, LENGTH)), jnp.zeros((ROWS, LENGTH, WIDTH))
    vectors = jnp.take(unit(params["embedding"]), rows.tokens, axis=0)
    plain = bound.denoise(rows.tokens, t, **where).logits()
    for tokens, mixed in ((rows.tokens, (keep, none)), (0 * rows.tokens, (0 * keep, vectors))):
        for told in (0.0, 0.5):  # what the vectors say by themselves is added
            said = bound.denoise(tokens, t, embeddings=NoisyEmbeddings(*mixed, told * keep), **where)
            more = told * vectors @ unit(params["embedding"])[:VOCAB].T
            np.testing.assert_allclose(said.logits(), plain + more, atol=2e-3)
            np.testing.assert_allclose(said.embeddings, unit(params["embedding"]))
    with pytest.raises(ValueError, match=r"set model\.time_conditioning=true"):
        network().denoise(rows.tokens, t, embeddings=NoisyEmbeddings(keep, none, keep), **where)


@pytest.mark.parametrize("rows", [2, 10, 512])
def test_the_mean_vector_is_the_plain_one_and_no_array_of_all_logits_exists(monkeypatch, rows):
    monkeypatch.setattr(readout_module, "_CHUNK_ROWS", rows)
    rng = np.random.default_rng(0)
    hidden, table, vectors = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 13, 8), (384, 8), (384, 8)))
    fields = {
        "table": table,
        "spec": LogitsSpec(300, "float32"),
        "alignment": Alignment.SAME,
        "embeddings": vectors,
    }
    mean = lambda hidden: ChunkedLogits(hidden=hidden, **fields).expected_embedding()  # noqa: E731
    plain = DenseLogits(values=jnp.einsum("ble,ve->blv", hidden, table)[..., :300], embeddings=vectors[:300])
    np.testing.assert_allclose(mean(hidden), plain.expected_embedding(), atol=1e-5)
    assert (jax.grad(lambda h: mean(h).sum())(hidden) == 0).all()
    if rows < 512:
        assert "f32[2,13,384]" not in str(jax.make_jaxpr(mean)(hidden))
