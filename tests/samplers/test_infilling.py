"""Texts of several lengths infilled together: each ends where its own text does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.text_samplers import NEVER, TEXT_SAMPLERS, prompts
from support.tiny import MASK, model

SUFFIXES = [[MASK, 7, MASK], [MASK, MASK, 8, MASK, MASK, 9], [5, MASK, MASK, MASK, 6]]  # prompts have 6, 1 and 3 tokens


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(text_sampler, bound, prompt, keys, length):
    cache = bound.empty_cache(len(prompt.length), max(text_sampler.slots(prompt.tokens.shape[1], length), 1))
    return text_sampler.generate(bound, cache, prompt, keys, max_new_tokens=length)


def together(text_sampler, seed=0, length=8):
    suffix = [row + [MASK] * (length - len(row)) for row in SUFFIXES]
    rows = {"suffix": jnp.asarray(suffix), "num_new_tokens": jnp.asarray([len(row) for row in SUFFIXES])}
    keys = jax.random.split(jax.random.key(seed), 3)
    return _generate(text_sampler, model(), prompts([6, 1, 3]).replace(**rows), keys, length)


def alone(text_sampler, row, seed=0, length=None):
    """length None: as many tokens as the row has, so that its last canvas is as narrow."""
    here, suffix = slice(row, row + 1), np.asarray(SUFFIXES[row])
    num_new_tokens = None if length is None else jnp.asarray([len(suffix)])
    suffix = np.pad(suffix, (0, 0 if length is None else length - len(suffix)), constant_values=MASK)
    prompt = jax.tree.map(lambda a: a[here], prompts([6, 1, 3])).replace(suffix=jnp.asarray(suffix[None]))
    keys = jax.random.split(jax.random.key(seed), 3)[here]
    return _generate(text_sampler, model(), prompt.replace(num_new_tokens=num_new_tokens), keys, suffix.size)


@pytest.mark.parametrize("row", [0, 1])
def test_the_greedy_text_is_that_of_canvases_which_end_where_it_does(row):
    """Nothing attends to positions of a canvas after the end of its text."""
    text_sampler = TEXT_SAMPLERS["confidence"](eos=NEVER, temperature=0.0)
    ours, theirs = together(text_sampler), alone(text_sampler, row)
    count = len(SUFFIXES[row])
    assert ours.length[row] == theirs.length[0] == count
    assert (ours.tokens[row, :count] == theirs.tokens[0]).all() and (ours.tokens[row, count:] == MASK).all()


@pytest.mark.parametrize("name", ["confidence", "blocks", "both ways"])
def test_a_row_alone_is_the_row_beside_longer_ones(name):
    text_sampler = TEXT_SAMPLERS[name]()
    for seed in range(3):
        batch, one = together(text_sampler, seed), alone(text_sampler, 0, seed, length=4)
        assert (batch.tokens[0, :4] == one.tokens[0]).all() and batch.length[0] == one.length[0] <= 3
        fixed = [(row, i, token) for row, text in enumerate(SUFFIXES) for i, token in enumerate(text) if token != MASK]
        assert all(batch.tokens[row, i] == token for row, i, token in fixed)
