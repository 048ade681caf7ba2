"""Log probabilities of continuations against sums over plain forward passes, one request at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.loaded import loaded
from support.small import MASK, read

from diffusion_lm.attention_patterns import BlockDiffusionTraining, Causal, Full
from diffusion_lm.inference import pipeline, presets, scoring
from diffusion_lm.inference.scoring import Request
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.samplers.sampling_params import SamplingParams

REQUESTS = [
    Request((9, 1, 2, 3), (4,)),
    Request((9, 1, 2, 3), (5, 6, 7)),
    Request((9, 1, 2, 3), (5, 6)),
    Request((9,), (1, 2, 1, 2, 1, 2)),
    Request((9, 1, 2), (0, 8, 3, 4)),
]
CANVASES = [ELBO(), BlockELBO(block_size=4), BlockELBO(block_size=4, clean="causal")]


def scored(model, requests, **options):
    found = dict(scoring.score(model, requests, **options))
    return [found[i] for i in range(len(requests))]


def padded(tokens, width=16):
    """One row, and its segment ids."""
    row = jnp.asarray([[*tokens, *[MASK] * (width - len(tokens))]], jnp.int32)
    return row, (jnp.arange(width) < len(tokens))[None].astype(jnp.int32)


# ---- autoregressive networks ----


def plainly(model, request):
    """log p and whether greedy, from the logits of one row."""
    row, _ = padded(request.context + request.continuation)
    log_probs = jax.nn.log_softmax(read(model.network, row, Causal())[0])
    rows = np.asarray(log_probs)[len(request.context) - 1 :][: len(request.continuation)]
    said = [row[token] for row, token in zip(rows, request.continuation, strict=True)]
    return sum(said), list(rows.argmax(axis=1)) == list(request.continuation)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_autoregressive_log_probabilities_are_those_of_plain_rows(batch_size):
    model = loaded(AutoregressiveLoss())
    for request, found in zip(REQUESTS, scored(model, REQUESTS, batch_size=batch_size), strict=True):
        log_prob, greedy = plainly(model, request)
        assert found.log_prob == pytest.approx(log_prob, abs=1e-5) and found.standard_error == 0
        assert found.greedy == greedy


def test_what_greedy_decoding_writes_is_greedy():
    model = loaded(AutoregressiveLoss())
    text_sampler = presets.autoregressive(model, sampling=SamplingParams(temperature=0.0))
    new = np.asarray(pipeline.generate(model, text_sampler, ["ab"], max_new_tokens=5, seed=0).generation.tokens[0])
    right, wrong = tuple(map(int, new)), (*map(int, new[:-1]), int(new[-1] + 1) % 9)
    assert [found.greedy for found in scored(model, [Request((9, 0, 1), r) for r in (right, wrong)])] == [True, False]


def test_a_shared_context_is_computed_once():
    model = loaded(AutoregressiveLoss())
    assert [found.passes for found in scored(model, REQUESTS)] == [1, 1, 1, 2, 2]


def test_windows_score_each_token_once_with_all_the_context_that_fits():
    model, ids = loaded(AutoregressiveLoss(), context=8), list(np.random.default_rng(0).integers(9, size=19))
    windows = scoring.windows(model, ids, bos=9)
    assert [token for window in windows for token in window.continuation] == ids
    assert [len(window.context) for window in windows] == [1, 1, 6] and windows[2].context == tuple(ids[10:16])
    assert all(len(window.context) + len(window.continuation) <= 9 for window in windows)


# ---- canvases ----


def by_enumeration(model, request):
    """Equation 6 of LLaDA, over all l and all subsets of l tokens, one canvas after the other."""
    layout, start = model.config.objective.layout, len(request.context)
    whole, total = request.context + request.continuation, 0.0
    width = 16
    size = width // layout.num_spans(width)
    for first in range(0, len(whole), size):
        targets = list(range(max(first, start), min(first + size, len(whole))))
        for masks in range(1, len(targets) + 1):
            subsets = list(itertools.combinations(targets, masks))
            for hidden in subsets:
                log_probs = noisy_log_probs(model, layout, whole, hidden)
                nats = -sum(log_probs[i, whole[i]] for i in hidden)
                total += nats / masks / len(subsets)  # n / l, and l uniform over 1..n
    return -total


def noisy_log_probs(model, layout, whole, hidden):
    clean, segment_ids = padded(whole)
    noisy = clean.at[0, list(hidden)].set(MASK)
    if isinstance(layout.attention, Full):
        logits = read(model.network, noisy, Full(), segment_ids=segment_ids)
    else:
        pattern = layout.attention
        assert isinstance(pattern, BlockDiffusionTraining)
        t = jnp.zeros((1, 8))
        rows = pattern.join(noisy, clean)
        logits = read(model.network, rows, pattern, t=t, segment_ids=segment_ids, length=clean.shape[1])[0]
    return np.asarray(jax.nn.log_softmax(logits[0]))


@pytest.mark.parametrize("objective", CANVASES, ids=["row", "blocks", "causal blocks"])
def test_the_mean_over_draws_is_equation_6_within_its_error(objective):
    model, request = loaded(objective), Request((9, 1, 2), (0, 8, 3))
    (found,) = scored(model, [request], draws=600, batch_size=1)
    assert 0 < found.standard_error < 0.1
    assert found.log_prob == pytest.approx(by_enumeration(model, request), abs=4 * found.standard_error)


@pytest.mark.parametrize("objective", CANVASES, ids=["row", "blocks", "causal blocks"])
def test_bounds_depend_on_no_other_request(objective):
    model = loaded(objective)
    together = scored(model, REQUESTS, draws=4, batch_size=16)
    assert together == scored(model, REQUESTS, draws=4, batch_size=16)
    for one in ({"batch_size": 1}, {"batch_size": 3}):
        for a, b in zip(together, scored(model, REQUESTS, draws=4, **one), strict=True):
            assert a.log_prob == pytest.approx(b.log_prob, abs=1e-5) and a[2:] == b[2:]


def test_one_token_has_no_noise():
    model = loaded(ELBO())
    (found,) = scored(model, [REQUESTS[0]])
    assert found.standard_error == 0 and found.passes == 2  # the other is for `greedy`
    assert found.log_prob == pytest.approx(by_enumeration(model, REQUESTS[0]), abs=1e-5)


def test_every_two_draws_share_a_stratum_of_the_number_of_masks():
    weights = scoring._noised(Request((9, 1), tuple(range(8))), 16, ELBO().layout, 8, seed=0)
    masks = (weights > 0).sum(axis=1)
    assert sorted((masks - 1) // 2) == [0, 0, 1, 1, 2, 2, 3, 3] and (weights.sum(axis=1) == pytest.approx(8))
    assert ((masks - 1)[::2] // 2 == (masks - 1)[1::2] // 2).all() and not weights[:, :2].any()


def test_greedy_is_what_one_token_a_pass_by_confidence_writes():
    model = loaded(ELBO(), context=16)
    text_sampler = presets.confidence(
        model, sampling=SamplingParams(temperature=0.0, suppressed=(9, 10)), canvas_length=7, denoising_steps=4
    )
    new = np.asarray(pipeline.generate(model, text_sampler, ["ab"], max_new_tokens=4, seed=0).generation.tokens[0])
    right = tuple(map(int, new))
    wrong = (int(new[0] + 1) % 9, *right[1:])
    assert [found.greedy for found in scored(model, [Request((9, 0, 1), r) for r in (right, wrong)])] == [True, False]


def test_other_noise_uses_the_objectives_own_bound():
    model = loaded(ELBO(), Uniform())
    few, many = (scored(model, REQUESTS, draws=8, batch_size=size) for size in (2, 16))
    for a, b in zip(few, many, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4) and a.standard_error > 0 and a.log_prob < 0
    assert not any(found.greedy for found in few)


@pytest.mark.parametrize("objective", [AutoregressiveLoss(), ELBO()], ids=["ar", "canvas"])
def test_what_has_no_room_is_refused(objective):
    model = loaded(objective, context=16)
    with pytest.raises(ValueError, match="don't go into the model's context of 16"):
        scoring.fitting(model, [9], range(17))
    assert scoring.fitting(model, range(30), [1, 2])[-1] == 29
    with pytest.raises(ValueError, match="a context that fits"):
        scoring.score(model, [Request(tuple(range(30)), (1,))])
    with pytest.raises(ValueError, match="draws must be even"):
        scoring.score(model, REQUESTS, draws=3)
