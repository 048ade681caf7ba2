"""Who sees whom under every reading, and that a cache changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small import MASK, SPECS, bound, denoise_canvas, extend, read, rows

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal, Full
from diffusion_lm.types import Alignment

CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture
def net():
    return bound(SPECS["grouped, untied, timed"])


@pytest.fixture(params=SPECS)
def each_net(request):
    return bound(SPECS[request.param])


def moved(net, attention, length, position, t=None, width=None):
    """bool: which positions' logits change when the token at `position` does."""
    tokens = rows(width or length, batch=1)
    other = tokens.at[0, position].set((tokens[0, position] + 1) % 11)
    one, two = (read(net, a, attention, t=t, length=length) for a in (tokens, other))
    if isinstance(one, tuple):
        one, two = jnp.concatenate(one, axis=1), jnp.concatenate(two, axis=1)
    return np.asarray(abs(one - two).max(axis=-1)[0] > 1e-5), np.asarray((one == two).all(axis=-1)[0])


def sees_exactly(net, attention, length, position, expected, width=None, t=None):
    changed, same = moved(net, attention, length, position, t, width)
    assert (changed == expected).all() and (same == ~expected).all()


def test_causal_sees_what_is_before(net):
    at = np.arange(12)
    for position in (0, 5, 11):
        sees_exactly(net, Causal(), 12, position, at >= position)


def test_bidirectional_sees_all(net):
    for position in (0, 5, 11):
        sees_exactly(net, Full(), 12, position, np.ones(12, bool))


def test_block_causal_sees_its_block_and_those_before(net):
    at = np.arange(12)
    for position in (0, 5, 11):
        sees_exactly(net, BlockCausal(4), 12, position, at // 4 >= position // 4)


@pytest.mark.parametrize("clean", [Causal(), BlockCausal(4)], ids=str)
def test_a_noisy_block_sees_itself_and_clean_blocks_before(net, clean):
    at, t = np.arange(12), jnp.array([[0.3, 0.5, 0.9, 0, 0, 0]])
    for position in (0, 5, 11):
        in_noisy = at // 4 == position // 4
        in_clean = at >= position if clean == Causal() else at // 4 >= position // 4
        attention = BlockDiffusionTraining(4, clean)
        nothing = np.zeros(12, bool)
        sees_exactly(net, attention, 12, position, np.concatenate([in_noisy, nothing]), width=24, t=t)
        later = np.concatenate([at // 4 > position // 4, in_clean])
        sees_exactly(net, attention, 12, 12 + position, later, width=24, t=t)


@pytest.mark.parametrize("attention", [Causal(), Full(), BlockCausal(4), BlockDiffusionTraining(4, Causal())], ids=str)
def test_documents_are_separate(net, attention):
    """Two documents in a row say what each says alone."""
    twice = isinstance(attention, BlockDiffusionTraining)
    tokens, noisy = rows(16), rows(16, seed=5)
    at = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32)[None], (2, 16))

    def said(part):
        both = jnp.concatenate([noisy[:, part], tokens[:, part]], axis=1) if twice else tokens[:, part]
        length = part.stop - part.start
        return read(net, both, attention, segment_ids=1 + at[:, part] // 8, positions=at[:, part] % 8, length=length)

    whole, halves = said(slice(0, 16)), (said(slice(0, 8)), said(slice(8, 16)))
    for w, a, b in zip(*(x if twice else (x,) for x in (whole, *halves)), strict=True):
        np.testing.assert_allclose(w, jnp.concatenate([a, b], axis=1), **CLOSE)


def test_the_causal_clean_half_is_the_causal_reading(net):
    tokens, noisy = rows(12), rows(12, seed=1).at[:, ::2].set(MASK)
    t = jnp.concatenate([jnp.full((2, 3), 0.4), jnp.zeros((2, 3))], axis=1)
    _, clean = read(net, jnp.concatenate([noisy, tokens], axis=1), BlockDiffusionTraining(4, Causal()), t=t, length=12)
    np.testing.assert_allclose(clean, read(net, tokens, Causal()), **CLOSE)


def test_alignment_is_stated(net):
    def alignment(attention):
        def say(tokens):
            at = jnp.zeros((2, 4), jnp.int32)
            return net.denoise(tokens, jnp.zeros((2, 2)), attention=attention, positions=at, segment_ids=at)

        said = jax.eval_shape(say, rows(8 if isinstance(attention, BlockDiffusionTraining) else 4))
        return tuple(one.alignment for one in said) if isinstance(said, tuple) else said.alignment

    assert alignment(Causal()) is Alignment.NEXT
    assert alignment(Full()) is alignment(BlockCausal(2)) is Alignment.SAME
    assert alignment(BlockDiffusionTraining(2, Causal())) == (Alignment.SAME, Alignment.NEXT)
    assert alignment(BlockDiffusionTraining(2, BlockCausal(2))) == (Alignment.SAME, Alignment.SAME)


# With a cache.


def ragged(net, lengths, slots, attention):
    """A cache that has read the first lengths[b] of row b, in one piece with padding behind."""
    tokens = rows(slots)
    said, cache = extend(net, net.empty_cache(2, slots), tokens[:, : max(lengths)], jnp.array(lengths), attention)
    return tokens, said, cache


def test_causal_with_a_cache_is_causal_without(each_net):
    sampling = each_net.for_sampling()
    full = read(each_net, rows(14), Causal())
    tokens, said, cache = ragged(sampling, [5, 3], 14, Causal())
    np.testing.assert_allclose(said[0], full[0, :5], **CLOSE)
    np.testing.assert_allclose(said[1, :3], full[1, :3], **CLOSE)
    for width in (1, 1, 4, 1):  # token by token, and some at once
        at = cache.length
        piece = jnp.take_along_axis(tokens, at[:, None] + jnp.arange(width, dtype=jnp.int32)[None], axis=1)
        said, cache = extend(sampling, cache, piece, jnp.full(2, width), Causal())
        for row in range(2):
            np.testing.assert_allclose(said[row], full[row, int(at[row]) : int(at[row]) + width], **CLOSE)
    assert cache.length.tolist() == [12, 10]


def test_greedy_tokens_are_the_same_with_a_cache(each_net):
    sampling = each_net.for_sampling()
    text = rows(3)
    said, cache = extend(sampling, sampling.empty_cache(2, 16), text, jnp.full(2, 3), Causal())
    for _ in range(10):
        token = said[:, -1].argmax(axis=-1)[:, None].astype(jnp.int32)
        padded = jnp.pad(text, ((0, 0), (0, 16 - text.shape[1])))  # what is behind is not seen
        uncached = read(each_net, padded, Causal())[:, text.shape[1] - 1].argmax(axis=-1)
        assert (token[:, 0] == uncached).all()
        text = jnp.concatenate([text, token], axis=1)
        said, cache = extend(sampling, cache, token, jnp.ones(2, jnp.int32), Causal())


def test_block_causal_with_a_cache_is_block_causal_without(each_net):
    sampling, attention = each_net.for_sampling(), BlockCausal(4)
    full = read(each_net, rows(16), attention)
    tokens, said, cache = ragged(sampling, [8, 4], 16, attention)
    np.testing.assert_allclose(said[0], full[0, :8], **CLOSE)
    for _ in range(2):
        at = cache.length
        piece = jnp.take_along_axis(tokens, at[:, None] + jnp.arange(4, dtype=jnp.int32)[None], axis=1)
        said, cache = extend(sampling, cache, piece, jnp.full(2, 4), attention)
        for row in range(2):
            np.testing.assert_allclose(said[row], full[row, int(at[row]) : int(at[row]) + 4], **CLOSE)


@pytest.mark.cases(2)
@pytest.mark.parametrize("clean", [Causal(), BlockCausal(4)], ids=str)
def test_a_canvas_over_the_cache_is_the_noisy_block_of_training(each_net, clean):
    sampling = each_net.for_sampling()
    tokens = rows(16)
    noisy = jnp.where(jnp.arange(16)[None] % 3 == 0, tokens, MASK)
    t = jnp.array([[0.2, 0.4, 0.6, 0.8]] * 2)
    both = jnp.concatenate([noisy, tokens], axis=1)
    trained, _ = read(
        each_net, both, BlockDiffusionTraining(4, clean), t=jnp.concatenate([t, 0 * t], axis=1), length=16
    )
    _, cache = extend(sampling, sampling.empty_cache(2, 20), tokens[:, :12], jnp.array([12, 4]), clean)
    canvas = jnp.stack([noisy[0, 12:], noisy[1, 4:8]])
    said = denoise_canvas(sampling, cache, canvas, jnp.array([0.8, 0.4]))
    np.testing.assert_allclose(said, jnp.stack([trained[0, 12:], trained[1, 4:8]]), **CLOSE)


def test_slots_that_are_not_filled_are_not_seen(net):
    sampling = net.for_sampling()
    _, _, cache = ragged(sampling, [5, 3], 14, Causal())
    behind = jnp.arange(14)[None] >= jnp.array([5, 3])[:, None]
    garbage = [
        layer.replace(
            k=jnp.where(behind[:, None, None, :], 9.0, layer.k), v=jnp.where(behind[:, None, :, None], 9.0, layer.v)
        )
        for layer in cache.layers
    ]
    canvas, t = rows(4, seed=2), jnp.full(2, 0.5)
    clean, dirty = (denoise_canvas(sampling, c, canvas, t) for c in (cache, cache.replace(layers=tuple(garbage))))
    assert (clean == dirty).all()


def test_time_matters_exactly_where_it_is_told():
    tokens = rows(8)
    for name, spec in SPECS.items():
        early, late = (read(bound(spec), tokens, Full(), t=jnp.full((2, 1), t)) for t in (0.1, 0.9))
        assert (abs(early - late).max() > 1e-3) == ("timed" in name)


# Long rows are read in chunks of queries.


@pytest.mark.parametrize(
    "attention", [Causal(), BlockCausal(6), BlockDiffusionTraining(6, Causal()), BlockDiffusionTraining(150, Causal())]
)
def test_the_beginning_of_a_long_row_is_read_like_a_short_row(attention):
    net, long, short = (
        bound(SPECS["plain"]),
        300,
        150 if attention == BlockDiffusionTraining(150, Causal()) else 90,
    )
    tokens, noisy = rows(long, batch=1), rows(long, batch=1, seed=1)

    def said(length):
        parts = tokens[:, :length]
        if isinstance(attention, BlockDiffusionTraining):
            parts = jnp.concatenate([noisy[:, :length], parts], axis=1)
        out = read(net, parts, attention, length=length)
        return out if isinstance(out, tuple) else (out,)

    for whole, piece in zip(said(long), said(short), strict=True):
        np.testing.assert_allclose(whole[:, :short], piece, **CLOSE)


@pytest.mark.parametrize("attention", [Causal(), Full()], ids=str)
def test_a_document_across_chunks_is_read_like_one_alone(attention):
    """Positions 100..189 of a long row, where a chunk of queries ends inside, against a short row of their own."""
    net, tokens = bound(SPECS["plain"]), rows(300, batch=1)
    at = jnp.arange(300, dtype=jnp.int32)[None]
    segment_ids = jnp.where((at >= 100) & (at < 190), 2, 1)
    whole = read(net, tokens, attention, segment_ids=segment_ids)
    alone = read(net, tokens[:, 100:190], attention, positions=at[:, 100:190])
    np.testing.assert_allclose(whole[:, 100:190], alone, **CLOSE)
