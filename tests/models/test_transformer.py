"""The network as a whole: parameters, stacking, rematerialisation, and the numbers it began with."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small import FLOAT32, MASK, SPECS, VOCAB, bound, boxed, module_of, read, rows

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal
from diffusion_lm.models.base import DenoiserSpec, Vocabulary
from diffusion_lm.models.bound_model import BoundModel, unstacked
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.sharding import RULES
from diffusion_lm.types import Batch


@pytest.fixture(params=SPECS)
def spec(request):
    return SPECS[request.param]


def a_batch(rows_=2, length=16):
    tokens = rows(length, batch=rows_)
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    return Batch(tokens=tokens, segment_ids=jnp.ones_like(tokens), positions=at, context_mask=at == 0, loss_mask=at > 0)


@functools.cache
def loss_of(module):
    def loss(params):
        parts = Joint(block_size=4)(
            BoundModel(module=module, params=params).denoise, Absorbing(mask=MASK), jax.random.key(5), a_batch()
        )
        return sum(part.mean for part in parts.values())

    return jax.jit(jax.value_and_grad(loss))


def test_every_parameter_names_its_axes(spec):
    """As many names as dimensions, each one that the table of axes knows."""
    known = {name for name, _ in RULES}
    leaves = jax.tree.leaves(boxed(spec), is_leaf=lambda a: isinstance(a, nn.Partitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim
        assert {name for name in leaf.names if name} <= known and leaf.value.dtype == jnp.float32
    stacked = [leaf for leaf in leaves if "layers" in leaf.names]
    assert stacked and all(leaf.names.index("layers") == 0 and leaf.value.shape[0] == 2 for leaf in stacked)


def test_rows_of_the_embedding_hold_the_mask_and_divide():
    assert Vocabulary(size=127, mask=127).rows == 128
    assert Vocabulary(size=128, mask=128).rows == 256
    assert Vocabulary(size=128, mask=5).rows == 128


def test_logits_have_no_column_for_the_mask(spec):
    assert read(bound(spec), rows(4), Causal()).shape == (2, 4, VOCAB)


def test_scanned_layers_are_layers_one_by_one(spec):
    net = bound(spec)
    apart = BoundModel(module=net.module.clone(scan=False), params=unstacked(net.params))
    attention = BlockDiffusionTraining(4, BlockCausal(4))
    tokens, t = jnp.concatenate([rows(8), rows(8, seed=1)], axis=1), jnp.array([[0.5, 0.25, 0, 0]] * 2)
    for one, other in zip(*(read(b, tokens, attention, t=t, length=8) for b in (net, apart)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    with pytest.raises(ValueError, match="for_sampling"):
        net.extend(net.empty_cache(2, 4), rows(2), jnp.full(2, 2), Causal())


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_number(remat):
    base = SPECS["grouped, untied, timed"]
    params = bound(base).params
    loss, gradient = loss_of(module_of(base))(params)
    again = loss_of(module_of(base, exec=dataclasses.replace(FLOAT32, remat=remat)))
    assert "remat" in str(again.trace(params).jaxpr)
    same_loss, same_gradient = again(params)
    np.testing.assert_allclose(loss, same_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, same_gradient)


def test_every_parameter_has_a_gradient(spec):
    _, gradient = loss_of(module_of(spec))(bound(spec).params)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.isfinite(g).all() and (g != 0).any(), jax.tree_util.keystr(path)


def test_a_fresh_network_knows_next_to_nothing(spec):
    loss, _ = loss_of(module_of(spec))(nn.meta.unbox(boxed(spec)))
    assert jnp.isfinite(loss)
    params = nn.meta.unbox(boxed(spec))
    said = jax.nn.log_softmax(read(BoundModel(module=module_of(spec), params=params), rows(8), Causal()))
    assert abs(said + np.log(VOCAB)).max() < 0.6


GOLDEN = {"plain": (4.616185, 3.916238), "grouped, untied, timed": (4.411781, 6.108223)}


@pytest.mark.parametrize("name", SPECS)
def test_the_first_step_is_what_it_was(name):
    """Loss and gradient norm of the joint objective with fixed parameters, noise and batch, float32 products.

    A change here changes what every run computes. The tolerance, 2e-5, is rounding between machines; another random
    generator, another initial value or another formula moves the third digit.
    """
    loss, gradient = loss_of(module_of(SPECS[name]))(bound(SPECS[name]).params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose([loss, norm], GOLDEN[name], rtol=2e-5)


@pytest.mark.parametrize(
    "bad",
    [{"heads": 3, "kv_heads": 2}, {"head_dim": 5}, {"layers": 0}, {"width": -16}, {"mlp_dim": -1}],
)
def test_sizes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=r"^model\.[^\n]*$"):
        DenoiserSpec(**bad)
