"""Positions of a row that are read again, in sight of what a cache holds of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small import MASK, SPECS, bound, read, rows

from diffusion_lm.attention_patterns import Full

L = 12
CLOSE = {"rtol": 0, "atol": 2e-5}
T = jnp.array([0.3, 0.6])
SOME = jnp.array([[1, 4, 7, L, L], [0, 2, 3, 10, 11]], jnp.int32)  # three positions of one row, five of the other
ALL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (2, L))

forward_positions = jax.jit(lambda net, cache, tokens, at: net.forward_positions(cache, tokens, at, T))


@pytest.fixture(params=SPECS)
def net(request):
    return bound(SPECS[request.param])


def at_places(a, at):
    index = jnp.minimum(at, L - 1)
    return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1)


def full(net, tokens):
    return read(net, tokens, Full(), t=T[:, None])


def read_all(net, tokens):
    """What a cache that has held anything but this says, and holds then."""
    anything = jax.tree.map(lambda a: a + jnp.ones_like(a), net.empty_cache(2, L))
    return forward_positions(net, anything, tokens, ALL)


def test_all_positions_are_a_full_pass(net):
    said, _ = read_all(net.for_sampling(), rows(L))
    np.testing.assert_allclose(said, full(net, rows(L)), **CLOSE)


def test_where_nothing_has_changed_some_positions_are_as_in_a_full_pass(net):
    sampling = net.for_sampling()
    _, cache = read_all(sampling, rows(L))
    said, after = forward_positions(sampling, cache, at_places(rows(L), SOME), SOME)
    exact = at_places(full(net, rows(L)), SOME)
    np.testing.assert_allclose(said[0, :3], exact[0, :3], **CLOSE)
    np.testing.assert_allclose(said[1], exact[1], **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), after, cache)


def test_the_others_are_seen_as_they_were_and_stay_so(net):
    """New tokens at some positions: what is kept of the others is bit for bit what it was, what is said is neither the
    full pass over the new row nor that over the old one."""
    sampling, new = net.for_sampling(), rows(L, seed=1)
    _, cache = read_all(sampling, rows(L))
    said, after = forward_positions(sampling, cache, at_places(new, SOME), SOME)
    touched = (SOME[:, :, None] == jnp.arange(L)[None, None]).any(axis=1)
    for old, now in zip(cache.layers, after.layers, strict=True):
        changed_k, changed_v = (old.k != now.k).any(axis=(1, 2)), (old.v != now.v).any(axis=(1, 3))
        assert (changed_k == touched).all() and (changed_v == touched).all()
    mixed = jnp.where(touched, new, rows(L))
    for row in (mixed, rows(L)):
        assert (abs(said - at_places(full(net, row), SOME)).max(axis=-1)[SOME < L] > 1e-3).all()
    np.testing.assert_allclose(after.layers[0].v, read_all(sampling, mixed)[1].layers[0].v, **CLOSE)


def test_no_position_is_seen_by_nobody(net):
    """Whatever token stands at an entry L, and however wide the pass: all but itself say the same."""
    sampling, tokens = net.for_sampling(), at_places(rows(L, seed=1), SOME)
    _, cache = read_all(sampling, rows(L))
    said, after = forward_positions(sampling, cache, tokens, SOME)
    other, same = forward_positions(sampling, cache, tokens.at[0, 3:].set(MASK), SOME)
    assert (said == other)[SOME < L].all()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), after, same)
    wide = jnp.where((SOME[:, :, None] == jnp.arange(L)[None, None]).any(axis=1), ALL, L)
    in_place = jnp.zeros((2, L), jnp.int32).at[jnp.arange(2)[:, None], SOME].set(tokens, mode="drop")
    all_wide, wider = forward_positions(sampling, cache, in_place, wide)
    np.testing.assert_allclose(at_places(all_wide, SOME)[SOME < L], said[SOME < L], **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), after, wider)
