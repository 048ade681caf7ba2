"""The categorical draw has the distribution it says, into the tail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_lm.categorical import INVALID, _invert, categorical, coupled, from_probabilities, likeliest

draw = jax.jit(categorical)
DRAWS = {
    "categorical": draw,
    "coupled": jax.jit(lambda key, rows: jax.vmap(coupled)(jax.random.split(key, len(rows)), rows)),
}


def some_logits(vocab, spread=1.0, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(scale=spread, size=vocab), jnp.float32)


def sample(logits, count, seed=0, chunk=2_000, draw=draw):
    """`count` draws from one distribution, each from a row of its own."""
    rows = jnp.broadcast_to(logits[None], (chunk, *logits.shape))
    keys = jax.random.split(jax.random.key(seed), count // chunk)
    return np.concatenate([np.asarray(draw(key, rows)) for key in keys])


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("vocab", [1, 7, 128, 129, 300, 5000])
def test_draws_follow_the_softmax(vocab, how):
    logits = some_logits(vocab)
    count = 20_000
    counts = np.bincount(sample(logits, count, draw=DRAWS[how]), minlength=vocab)
    assert len(counts) == vocab
    expected = np.asarray(jax.nn.softmax(logits), np.float64)
    order = np.argsort(expected)  # rare ones together, so that every bin expects enough
    bins = np.minimum(np.cumsum(expected[order]) * min(vocab, 500), min(vocab, 500) - 1e-3).astype(int)
    seen, wanted = (np.bincount(bins, weights=x[order]) for x in (counts, expected))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0] / wanted.sum() * count
    if vocab > 1:
        assert stats.chisquare(seen, wanted).pvalue > 1e-3


def test_the_chi_square_would_notice_a_wrong_temperature():
    logits = some_logits(7)
    counts = np.bincount(sample(logits / 1.05, 20_000), minlength=7)
    assert stats.chisquare(counts, np.asarray(jax.nn.softmax(logits)) * 20_000, sum_check=False).pvalue < 1e-3


@pytest.mark.parametrize("how", DRAWS)
def test_rare_tokens_are_drawn_at_their_rate(how):
    """1,000 tokens of probability one in a million each: together one draw in a thousand."""
    p = np.full(1_300, (1 - 1e-3) / 300)
    p[np.random.default_rng(0).permutation(1_300)[:1_000]] = 1e-6
    logits = jnp.asarray(np.log(p), jnp.float32)
    count = 200_000
    rare = p[sample(logits, count, draw=DRAWS[how])] == 1e-6
    assert abs(rare.sum() - count * 1e-3) < 4 * np.sqrt(count * 1e-3)


@pytest.mark.parametrize("how", DRAWS)
def test_a_lone_rare_block_is_drawn_at_its_rate(how):
    """A tail of 1e-4 in blocks of its own, in front and behind."""
    for flip in (1, -1):
        p = np.concatenate([np.full(128, 1e-4 / 128), [1 - 1e-4], np.zeros(300)])[::flip]
        with np.errstate(divide="ignore"):
            tokens = sample(jnp.asarray(np.log(p), jnp.float32), 200_000, draw=DRAWS[how])
        assert (p[tokens] > 0).all()
        assert abs((p[tokens] < 1e-3).sum() - 20) < 4 * np.sqrt(20)


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("vocab", [5, 128, 700])
def test_the_impossible_is_never_drawn(vocab, how):
    possible = np.random.default_rng(1).random(vocab) < 0.3
    possible[vocab // 2] = True
    possible[[0, -1]] = False
    logits = jnp.where(jnp.asarray(possible), some_logits(vocab, 4.0), -jnp.inf)
    assert possible[sample(logits, 20_000, draw=DRAWS[how])].all()


@pytest.mark.parametrize(("vocab", "apart"), [(12, 0.3), (12, 2.0), (100, 1.0), (700, 0.3), (700, 1.0)])
def test_draws_of_one_key_agree_nearly_as_often_as_distributions_overlap(vocab, apart):
    """At least (1 - d) / (1 + d) and at most 1 - d, at a total variation distance of d; in 4,000 draws, within four
    standard errors. Two uniforms agree less often."""
    p, q = some_logits(vocab, 1.5), some_logits(vocab, 1.5) + some_logits(vocab, apart, seed=1)
    count, distance = 4_000, 0.5 * float(jnp.abs(jax.nn.softmax(p) - jax.nn.softmax(q)).sum())
    agree = {n: (sample(p, count, draw=d) == sample(q, count, draw=d)).mean() for n, d in DRAWS.items()}
    error = 4 * np.sqrt(agree["coupled"] * (1 - agree["coupled"]) / count)
    assert (1 - distance) / (1 + distance) - error <= agree["coupled"] <= 1 - distance + error
    assert agree["categorical"] < agree["coupled"] + error


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-23])
def test_the_impossible_is_never_drawn_at_the_ends_of_the_uniform(u, monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, u, jnp.float32))
    possible = np.zeros(1_000, bool)
    possible[[130, 400, 777]] = True
    logits = jnp.where(jnp.asarray(possible), some_logits(1_000), -jnp.inf)
    assert possible[int(categorical(jax.random.key(0), logits))]


def test_rounded_sums_do_not_draw_the_impossible():
    """Long running sums are rounded in a tree, and rise a little over entries of no weight."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.random(1_200) < 0.5, rng.exponential(size=1_200), 0.0).astype(np.float32)
    running = np.asarray(jnp.cumsum(jnp.asarray(weights)[None], axis=-1))[0]
    edges = np.floor(running / running[-1] * 2**23)[:, None] + np.arange(-3, 4)
    u = jnp.asarray(edges.clip(0, 2**23 - 1).reshape(-1) / 2**23, jnp.float32)
    index = jax.jit(_invert)(u, jnp.broadcast_to(jnp.asarray(weights)[None], (len(u), 1_200)))
    assert (weights[np.asarray(index)] > 0).all()


def test_rows_are_independent():
    logits = jnp.broadcast_to(some_logits(4)[None], (2, 4))
    pairs = np.asarray(jax.vmap(categorical, in_axes=(0, None))(jax.random.split(jax.random.key(5), 20_000), logits))
    table = np.zeros((4, 4))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert (pairs[:, 0] != pairs[:, 1]).any()


def test_shapes_and_keys():
    logits = jnp.stack([some_logits(300, seed=s) for s in range(6)]).reshape(2, 3, 300)
    tokens = draw(jax.random.key(0), logits)
    assert tokens.shape == (2, 3) and tokens.dtype == jnp.int32
    assert (tokens == draw(jax.random.key(0), logits + 11.0)).all()  # a constant changes nothing
    assert (tokens == draw(jax.random.key(0), logits)).all() and (tokens != draw(jax.random.key(1), logits)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_is_never_drawn(bad):
    """Others are drawn as if it weren't there: log of a probability that rounding made negative, for one."""
    logits = jnp.log(jnp.array([0.0, 0.25, 0.0, 0.75])).at[2].set(bad)
    drawn = np.asarray(jax.vmap(lambda key: categorical(key, logits))(jax.random.split(jax.random.key(0), 4_000)))
    assert set(drawn.tolist()) == {1, 3} and abs((drawn == 3).mean() - 0.75) < 0.03
    assert likeliest(logits) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_where_no_logit_is_finite_no_token_is_drawn(bad):
    logits = jnp.full((2, 5), bad).at[1, 3].set(0.0)
    keys = jax.random.split(jax.random.key(0), 2)
    assert jax.vmap(coupled)(keys, logits).tolist() == [INVALID, 3]
    assert categorical(jax.random.key(0), logits).tolist() == [INVALID, 3]
    assert likeliest(logits).tolist() == [INVALID, 3]


def test_the_logarithm_of_a_probability_that_rounding_made_negative():
    p = jnp.array([0.0, 0.0, 0.0, -6e-8, 1.0])
    assert from_probabilities(jax.random.key(0), p) == 4
    drawn = categorical(jax.random.key(0), jnp.log(p))
    assert drawn == 4
