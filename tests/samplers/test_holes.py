"""Texts of several lengths filled in together: each ends where its own text does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.text_samplers import NEVER, WRITERS, prompts
from support.tiny import MASK, model

pytestmark = pytest.mark.usefixtures("quick_compile")

BEHIND = [[MASK, 7, MASK], [MASK, MASK, 8, MASK, MASK, 9], [5, MASK, MASK, MASK, 6]]  # prompts have 6, 1 and 3 tokens


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(writer, bound, prompt, keys, length):
    cache = bound.empty_cache(len(prompt.length), max(writer.slots(prompt.tokens.shape[1], length), 1))
    return writer.generate(bound, cache, prompt, keys, max_new_tokens=length)


def together(writer, seed=0, length=8):
    behind = [row + [MASK] * (length - len(row)) for row in BEHIND]
    laid = {"suffix": jnp.asarray(behind), "num_new_tokens": jnp.asarray([len(row) for row in BEHIND])}
    keys = jax.random.split(jax.random.key(seed), 3)
    return _generate(writer, model(), prompts([6, 1, 3]).replace(**laid), keys, length)


def alone(writer, row, seed=0, length=None):
    """length None: as much as the row wants, so that its last canvas is as narrow."""
    here, behind = slice(row, row + 1), np.asarray(BEHIND[row])
    wanted = None if length is None else jnp.asarray([len(behind)])
    behind = np.pad(behind, (0, 0 if length is None else length - len(behind)), constant_values=MASK)
    prompt = jax.tree.map(lambda a: a[here], prompts([6, 1, 3])).replace(suffix=jnp.asarray(behind[None]))
    keys = jax.random.split(jax.random.key(seed), 3)[here]
    return _generate(writer, model(), prompt.replace(num_new_tokens=wanted), keys, behind.size)


@pytest.mark.parametrize("row", [0, 1])
def test_the_likeliest_text_is_that_of_canvases_which_end_where_it_does(row):
    """Nothing is seen of what a canvas has beyond."""
    writer = WRITERS["confidence"](eos=NEVER, temperature=0.0)
    ours, theirs = together(writer), alone(writer, row)
    count = len(BEHIND[row])
    assert ours.length[row] == theirs.length[0] == count
    assert (ours.tokens[row, :count] == theirs.tokens[0]).all() and (ours.tokens[row, count:] == MASK).all()


@pytest.mark.parametrize("name", ["confidence", "blocks", "both ways"])
def test_a_row_alone_is_the_row_beside_longer_ones(name):
    writer = WRITERS[name]()
    for seed in range(3):
        batch, one = together(writer, seed), alone(writer, 0, seed, length=4)
        assert (batch.tokens[0, :4] == one.tokens[0]).all() and batch.length[0] == one.length[0] <= 3
        fixed = [(row, i, token) for row, text in enumerate(BEHIND) for i, token in enumerate(text) if token != MASK]
        assert all(batch.tokens[row, i] == token for row, i, token in fixed)
