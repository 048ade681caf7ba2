"""A text and a canvas behind each of its positions, in one pass behind a cache: what separate reads say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small import MASK, SPECS, bound, denoise_canvas, extend, rows

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.types import Alignment

TEXT, MASKS = 3, 2
CLOSE = {"rtol": 0, "atol": 1e-5}
fork = jax.jit(lambda bound, *seen: bound.draft_and_verify(*seen), static_argnums=4)


@pytest.fixture(params=SPECS)
def net(request):
    return bound(SPECS[request.param]).for_sampling()


def begun(net):
    """A cache of 12 slots that has read 5 positions of one row and 2 of the other, and what comes next of each."""
    _, cache = extend(net, net.empty_cache(2, 12), rows(5), jnp.array([5, 2]), Causal())
    return cache, rows(TEXT, seed=1)


def test_what_is_said_is_what_separate_reads_say(net):
    cache, tokens = begun(net)
    said, ahead, _ = fork(net, cache, tokens, jnp.array([TEXT, TEXT]), MASKS)
    causal, _ = extend(net, cache, tokens, jnp.array([TEXT, TEXT]), Causal())
    np.testing.assert_allclose(said.logits(), causal, **CLOSE)
    assert (said.alignment, ahead.alignment) == (Alignment.NEXT, Alignment.SAME)
    for i in range(TEXT):
        _, behind = extend(net, cache, tokens[:, : i + 1], jnp.full(2, i + 1), Causal())
        alone = denoise_canvas(net, behind, jnp.full((2, MASKS), MASK), jnp.ones(2))
        np.testing.assert_allclose(ahead.logits()[:, i * MASKS : (i + 1) * MASKS], alone, **CLOSE)


def test_the_cache_has_the_text_and_nothing_of_the_canvases(net):
    cache, tokens = begun(net)
    count = jnp.array([2, 0])
    _, _, after = fork(net, cache, tokens, count, MASKS)
    _, expected = extend(net, cache, tokens, count, Causal())
    assert (after.length == expected.length).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), after, expected)
