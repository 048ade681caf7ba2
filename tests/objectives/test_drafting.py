"""Drafting: its pass is the sampler's, an exact student costs nothing, and its least cost is known by enumeration."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import small
from support.begun import config_of, trained
from support.oracle import LENGTH, MASK, TEXTS, VOCAB, Oracle, batch_of, conditionals, truth
from support.tiny import generated

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.build import update_flops
from diffusion_lm.config import override
from diffusion_lm.draft_pattern import Drafts
from diffusion_lm.nn.lora import LoRA
from diffusion_lm.objectives.drafting import Drafting
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.drafters import TiDARDraft, TrainedDraft
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.speculative import Speculative
from diffusion_lm.training import metrics
from diffusion_lm.training.adapters import adapters_of, frozen_of, joined
from diffusion_lm.types import Alignment, Batch, DenseLogits

PROCESS = Absorbing(mask=MASK)


class Seer:
    """The world's next-token law for a text; for drafts that of the text itself (exact), or given the anchor's past."""

    def __init__(self, exact):
        self.exact = exact

    def __call__(self, tokens, t, *, attention, positions, segment_ids):
        text, masks = attention.split(tokens)
        assert (positions.shape, masks.shape[1]) == (text.shape, attention.anchors.shape[1] * attention.draft_length)
        after = Oracle()._next(text)
        places = attention.places(LENGTH)
        if self.exact:
            drafts = jnp.take_along_axis(after, places[..., None], axis=1)
        else:
            anchor = jnp.repeat(attention.anchors, attention.draft_length, axis=1)
            seen = jnp.where(jnp.arange(LENGTH)[None, None] <= anchor[..., None], text[:, None], MASK)
            said = jnp.pad(conditionals(seen), ((0, 0), (0, 0), (0, 1), (0, 0)))
            drafts = jnp.take_along_axis(said, (places + 1)[..., None, None], axis=2)[:, :, 0]
        return tuple(DenseLogits(values=values, alignment=Alignment.NEXT) for values in (after, drafts))


def cost(objective, exact):
    """Nats, or distance, of all texts and anchors in the mean over the world, and how many masks a text scores."""

    def one(text):
        found = objective(Seer(exact), PROCESS, jax.random.key(0), batch_of(text[None]))["draft"]
        return found.sum, found.weight

    sums, weights = jax.jit(jax.vmap(one))(jnp.asarray(TEXTS))
    return float(np.asarray(sums, np.float64) @ truth()), float(weights[0])


@pytest.mark.parametrize("draft_length", [1, 2, 4])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5, 1.0])
def test_an_exact_student_is_always_accepted(draft_length, kl_weight):
    """The distance is one minus the chance of acceptance: it is 0 at every length."""
    distance, _ = cost(Drafting(draft_length=draft_length, num_anchors=LENGTH, kl_weight=kl_weight), exact=True)
    assert abs(distance) < 1e-6


def test_what_masks_cannot_know():
    """A student that knows all up to its anchor: its KL is the information that the hidden tokens have, its total
    variation the chance that its best draft is rejected, both from the table."""
    p = truth().reshape((VOCAB,) * LENGTH)
    nats = rejected = masks = 0.0
    for anchor, step in itertools.product(range(LENGTH), range(2)):
        at = anchor + step + 2  # the token that is drafted
        if at >= LENGTH:
            continue
        masks += 1
        joint = p.sum(axis=tuple(range(at + 1, LENGTH)))  # of the text up to that token
        known = joint.sum(axis=tuple(range(anchor + 1, at)), keepdims=True)
        teacher = joint / joint.sum(axis=-1, keepdims=True)
        student = np.broadcast_to(known / known.sum(axis=-1, keepdims=True), joint.shape)
        nats += (joint * np.log(teacher / student)).sum()
        rejected += (joint.sum(axis=-1) * (1 - np.minimum(teacher, student).sum(axis=-1))).sum()
    settings = {"draft_length": 2, "num_anchors": LENGTH}
    assert cost(Drafting(kl_weight=1.0, **settings), exact=False) == pytest.approx((nats, masks), rel=1e-4)
    assert cost(Drafting(**settings), exact=False) == pytest.approx((rejected, masks), rel=1e-4)
    half = cost(Drafting(kl_weight=0.5, **settings), exact=False)[0]
    assert half == pytest.approx((nats + rejected) / 2, rel=1e-4)


def test_the_training_pass_is_the_samplers_and_lengths_agree():
    """Masks behind an anchor, after documents that share the row: what a cache up to there and `fork` say."""
    network, tokens = small.bound(small.SPECS["plain"]), small.rows(12)
    segment_ids = jnp.asarray([[1] * 12, [1] * 5 + [2] * 7])
    positions = jnp.asarray([[*range(12)], [*range(5), *range(7)]])
    anchors = jnp.asarray([[2, 5, 7], [1, 6, 9]])

    def drafted(length):
        attention = Drafts(anchors, length)
        row = attention.join(tokens, jnp.full((2, 3 * length), small.MASK))
        where = {"attention": attention, "positions": positions, "segment_ids": segment_ids}
        text, drafts = network.denoise(row, jnp.zeros((2, 1)), **where)
        return text.logits(), drafts.logits().reshape(2, 3, length, -1)

    (text, two), (_, three) = (jax.jit(drafted, static_argnums=0)(n) for n in (2, 3))
    np.testing.assert_allclose(two, three[:, :, :2], atol=1e-5)
    for row, start in ((0, 0), (1, 0), (1, 5)):
        own = tokens[row, start:][None]
        clean = small.read(network, own, Causal())
        stop = 5 if (row, start) == (1, 0) else 12
        np.testing.assert_allclose(text[row, start:stop], clean[0, : stop - start], atol=1e-5)
    sampling, fork = (
        network.for_sampling(),
        jax.jit(lambda n, c, x: n.draft_and_verify(c, x, jnp.ones(1, jnp.int32), 2, True)),
    )
    for row, number, start in ((0, 1, 0), (1, 0, 0), (1, 2, 5)):
        anchor = int(anchors[row, number])
        before = tokens[row : row + 1, start:anchor]
        _, cache = small.extend(sampling, sampling.empty_cache(1, 16), before, jnp.array([anchor - start]), Causal())
        head, drafts, _ = fork(sampling, cache, tokens[row : row + 1, anchor : anchor + 1])
        np.testing.assert_allclose(drafts.logits()[0], two[row, number], atol=1e-5)
        np.testing.assert_allclose(head.logits()[0, 0], text[row, anchor], atol=1e-5)


def test_drafts_grow_over_a_run():
    """2, 4, then 8, in stages of equal duration; each computes no more masks than it trains."""
    growing = Drafting(draft_length=8, num_anchors=1, growth=0.5)
    assert [(end, each.draft_length) for end, each in growing.stages()] == [(0.25, 2), (0.5, 4), (1.0, 8)]
    assert [end for end, _ in Drafting(draft_length=8, num_anchors=1).stages()] == [1.0]
    assert [end for end, _ in Drafting(draft_length=2, num_anchors=1, growth=0.5).stages()] == [1.0]


@pytest.mark.parametrize("num_anchors", [1, 3, 5, 9, 12])
def test_anchors_are_drawn_from_the_targets(num_anchors):
    """Of a row of two documents, one with a prompt, and padding: each position whose first mask has a target is an
    anchor equally often, none twice in one draw, and all are where they are few."""
    seen = []

    class Counter(Seer):
        def __call__(self, tokens, t, *, attention, **where):
            seen.append(attention.anchors)
            return tuple(
                DenseLogits(values=jnp.zeros((*part.shape, VOCAB)), alignment=Alignment.NEXT)
                for part in attention.split(tokens)
            )

    segment_ids = jnp.asarray([[1] * 5 + [2] * 5 + [0] * 2])
    loss_mask = jnp.asarray([[False] + [True] * 4 + [False] * 3 + [True] * 2 + [False] * 2])
    batch = Batch(
        tokens=jnp.zeros((1, 12), jnp.int32), segment_ids=segment_ids, positions=jnp.arange(12)[None],
        context_mask=jnp.zeros((1, 12), bool), loss_mask=loss_mask,
    )  # fmt: skip
    targets = [0, 1, 2, 6, 7]  # two before a target of their own document
    draws = jax.jit(
        jax.vmap(lambda key: (Drafting(num_anchors=num_anchors, draft_length=1)(
            Counter(False), PROCESS, key, batch)["draft"].weight, seen.pop()[0]))
    )  # fmt: skip
    weight, anchors = jax.device_get(draws(jax.random.split(jax.random.key(1), 2000)))
    count = min(num_anchors, len(targets))
    np.testing.assert_array_equal(weight, count)
    assert (np.diff(anchors[:, :count], axis=1) > 0).all()
    often = np.bincount(anchors[:, :count].reshape(-1), minlength=12) / len(anchors)
    assert set(np.flatnonzero(often)) == set(targets)
    np.testing.assert_allclose(often[targets], count / len(targets), atol=0.05)


@pytest.fixture(scope="module")
def drafting(converted, lines, tmp_path_factory):
    """The workdir and the model of a few updates of adapters beside the converted model."""
    objective, home = Drafting(draft_length=3, num_anchors=4, kl_weight=1.0, growth=0.5), tmp_path_factory.mktemp("run")
    config = config_of(
        lines, objective, trainable=LoRA(rank=4), init=str(converted[0]), steps=6, log_every=1, eval_every=6
    )
    return home, trained(override(config, ["exec.compute_dtype=float32", "checkpoint.save_every=6"]), home)


def test_adapters_learn_to_draft_beside_a_converted_model(drafting, converted):
    """They move, drafts grow, and the base stays."""
    home, model = drafting
    rows = [row for row in metrics.read(home) if "loss/draft" in row]
    assert rows[0]["targets"] < rows[-1]["targets"] and np.isfinite(rows[-1]["loss/draft"])
    assert np.abs(adapters_of(model.network.params)["layer_1"]["mlp"]["down_lora_b"]).max() > 0
    np.testing.assert_array_equal(model.network.params["embedding"], converted[1].network.params["embedding"])


def test_operations_are_those_of_the_stages_in_the_mean(drafting):
    _, model = drafting
    config, parts = model.config, (model.network.module, model.process)
    alone = [dataclasses.replace(config.objective, draft_length=k, growth=0.0) for k in (2, 3)]
    two, three = (update_flops(dataclasses.replace(config, objective=each), *parts) for each in alone)
    assert two < three and update_flops(config, *parts) == pytest.approx((two + three) / 2, rel=1e-9)


@pytest.mark.cases(1)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_the_bases_own_whatever_the_adapters(drafting, converted, temperature):
    """Adapters of any size: 200 prompts in one batch, in both shapes, token for token the base's autoregression."""
    _, model = drafting
    rng = np.random.default_rng(0)
    large = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), a.dtype), adapters_of(model.network.params))
    network = model.network.replace(params=joined(frozen_of(model.network.params), large))
    sampling, prompts = SamplingParams(temperature=temperature), rng.integers(3, 300, (200, 5))
    base = converted[1]
    eos = base.tokenizer.eos
    plain = AutoregressiveSampler(mask=base.tokenizer.mask, eos=eos, sampling=sampling)
    prompt = Prompt(tokens=jnp.asarray(prompts, jnp.int32), length=jnp.full(200, 5, jnp.int32))
    expected = generated(base.network.for_sampling(), plain, prompt, 12)
    for drafter in (TrainedDraft(num_tokens=4), TiDARDraft(num_tokens=3, causal=True)):
        sampler = Speculative(drafter=drafter, mask=base.tokenizer.mask, eos=eos, sampling=sampling)
        found = generated(network.for_sampling(), sampler, prompt, 12)
        np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft_length": 0}, "draft_length"),
        ({"num_anchors": 0}, "num_anchors"),
        ({"kl_weight": 2.0}, "kl_weight"),
        ({"growth": -1.0}, "growth"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Drafting(**fields)


def test_more_anchors_than_positions_is_one_line():
    with pytest.raises(ValueError, match="hold no 5 anchors"):
        Drafting(num_anchors=5)(Seer(True), PROCESS, jax.random.key(0), batch_of(TEXTS[:1]))
