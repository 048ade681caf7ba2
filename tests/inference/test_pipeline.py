"""From strings to strings: infilling, a rolling context, rows that leave the batch, and best-of-n."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.evaluation.generation_quality import judged
from diffusion_lm.inference import best_of_n, pipeline, presets
from diffusion_lm.inference.pipeline import encode_prompts
from diffusion_lm.samplers.logits_processors import NoRepeatNGram, SuppressTokens
from diffusion_lm.samplers.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def letters(model):
    """Whole characters only: single sampled bytes need not be text."""
    tokenizer = model.tokenizer
    pieces = tokenizer.pieces(range(tokenizer.vocab))
    return (*tokenizer.suppressed, *(i for i, piece in enumerate(pieces) if len(piece) > 1 and i != tokenizer.eos))


@pytest.fixture(scope="module")
def draw(model, letters):
    return SamplingParams(suppressed=(*letters, model.tokenizer.eos))


@pytest.fixture(scope="module")
def canvases(model, letters):
    return presets.confidence(model, sampling=SamplingParams(suppressed=letters), canvas_length=16, denoising_steps=4)


# ---- infilling ----


def test_fixed_text_stays_and_holes_have_their_size(model, canvases):
    texts = [["Line 3: the ", 3, " sat on ", 4, " mat."], ["Line 4: the hen ", 3, " on"]]
    answer = pipeline.infill(model, canvases, texts, seed=1)
    first, second = answer.texts
    assert len(first) == 3 + len(" sat on ") + 4 + len(" mat.") and first[3:11] == " sat on " and first[-5:] == " mat."
    assert len(second) == 6 and second[3:] == " on"  # characters are tokens here


def test_a_text_is_infilled_alike_alone_and_beside_longer_ones(model, canvases):
    short, long = ["Line ", 2, ": the"], ["Line 4: the hen ", 9, " on the mat and there it sat"]
    together = pipeline.infill(model, canvases, [long, short], seed=3).texts[1]
    key_of_second = pipeline.infill(model, canvases, [short, short], seed=3).texts[1]
    assert together == key_of_second


def test_a_hole_at_the_end_may_end_the_text_and_others_may_not(model):
    """All but the end of text is suppressed: it can be sampled only after the last fixed token."""
    tokenizer = model.tokenizer
    most = tuple(i for i in range(tokenizer.vocab) if i not in (tokenizer.eos, *tokenizer.encode("ab")))
    text_sampler = presets.confidence(
        model, sampling=SamplingParams(suppressed=most, temperature=0.0), canvas_length=16, denoising_steps=4
    )
    (text,) = pipeline.infill(model, text_sampler, [["Line ", 3, "the", 3]], seed=0).texts
    assert text[3:6] == "the" and set(text) <= set("abthe") and len(text) >= 6


def test_what_can_not_be_infilled_is_refused_in_one_line(model, canvases, draw):
    with pytest.raises(ValueError, match="infill"):
        pipeline.infill(model, presets.autoregressive(model, sampling=draw), [["a", 2]], seed=0)
    for texts, cause in (([["no hole"]], "hole"), ([["a", 0, "b"]], "hole"), ([["a", 63, "b"]], "context")):
        with pytest.raises(ValueError, match=cause):
            pipeline.infill(model, canvases, texts, seed=0)


def test_the_best_of_several_lengths_is_the_likeliest(model, canvases):
    chosen = best_of_n.infill_best(
        model, canvases, ["Line ", range(1, 5), ": the cat"], score=best_of_n.log_likelihood, seed=0
    )
    lengths = [len(text) - len(": the cat") for text in chosen.output.texts]
    assert lengths == [1, 2, 3, 4] and chosen.scores.argmax() == chosen.index[0]
    assert chosen.texts == [chosen.output.texts[chosen.index[0]]]
    with pytest.raises(ValueError, match="fewer"):
        best_of_n.infill_best(
            model, canvases, [range(1, 10), "a", range(1, 10)], score=best_of_n.log_likelihood, seed=0
        )


def test_many_lengths_are_one_program_and_none_came_to_an_end(model, canvases, caplog):
    def ended(model, answer):
        """Text follows the hole: the ends that are scored are those of the whole text."""
        batch = best_of_n.answers_batch(model, answer)
        assert (
            batch.loss_mask.sum(axis=1).tolist() == answer.generation.length.tolist() == answer.max_new_tokens.tolist()
        )
        return answer.max_new_tokens

    with jax.log_compiles():
        best_of_n.infill_best(model, canvases, ["Line ", range(1, 8), ": the cat"], score=ended, seed=0)
    assert sum("Compiling jit(_generate)" in record.getMessage() for record in caplog.records) == 1


# ---- few programs ----


def test_prompts_of_all_widths_share_a_few_programs(model, draw, caplog):
    """Prompts of 1 to 56 tokens in a context of 64: widths of 16, 32, 60, and one line for each."""
    text_sampler = presets.autoregressive(model, sampling=draw)
    caplog.set_level("INFO", "diffusion_lm")
    with jax.log_compiles():
        for width in (*range(1, 40), 55):
            pipeline.generate(model, text_sampler, ["a" * width], max_new_tokens=4, seed=0)
    said = [record.getMessage() for record in caplog.records]
    assert sum("Compiling jit(_generate)" in line for line in said) == 3
    assert sum(line.startswith("compiling for 1 rows") for line in said) == 3


def test_holes_of_all_lengths_share_a_few_programs(model, canvases, caplog):
    with jax.log_compiles():
        for hole in range(1, 28, 3):
            pipeline.infill(model, canvases, [["Line " + "x" * hole, hole, ": the"]], seed=0)
    assert sum("Compiling jit(_generate)" in record.getMessage() for record in caplog.records) == 2


# ---- any length ----


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["confidence", "autoregressive"])
def test_text_longer_than_the_context(model, draw, kind):
    options = {"canvas_length": 16, "denoising_steps": 4} if kind == "confidence" else {}
    text_sampler = getattr(presets, kind)(model, sampling=draw, **options)
    prompts = ["Line 1", "Line 22: the cat", "Line 3"]
    answer = pipeline.generate(model, text_sampler, prompts, max_new_tokens=90, seed=5, rolling_context=True)
    assert (answer.generation.length == 90).all() and all(len(text) == 90 for text in answer.texts)
    beside = pipeline.generate(
        model, text_sampler, [prompts[0], "Line 99: a horse", "other!"], max_new_tokens=90, seed=5, rolling_context=True
    )
    assert beside.texts[0] == answer.texts[0] and beside.texts[1:] != answer.texts[1:]
    within = pipeline.generate(model, text_sampler, prompts, max_new_tokens=32, seed=5)
    assert answer.texts[0].startswith(within.texts[0])  # nothing slides before the context is full


def test_a_text_that_ends_does_not_roll_on(model, letters):
    text_sampler = presets.autoregressive(model, sampling=SamplingParams(suppressed=letters, temperature=3.0))
    answer = pipeline.generate(model, text_sampler, [""] * 6, max_new_tokens=100, seed=2, rolling_context=True)
    counts = np.asarray(answer.generation.length)
    assert counts.min() < 100 and [len(text) > 0 for text in answer.texts] == [n > 0 for n in counts]


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_scale_of_guidance_is_a_positive_number(model, draw, scale):
    text_sampler = presets.autoregressive(model, sampling=draw)
    with pytest.raises(ValueError, match=r"cfg_scale must be 0 .* got"):
        pipeline.generate(model, text_sampler, ["Line"], max_new_tokens=1, seed=0, cfg_scale=scale)


def test_a_rolling_context_is_requested(model, draw):
    with pytest.raises(ValueError, match="rolling_context"):
        pipeline.generate(model, presets.autoregressive(model, sampling=draw), ["Line"], max_new_tokens=150, seed=0)
    with pytest.raises(ValueError, match="guidance"):
        pipeline.generate(
            model,
            presets.autoregressive(model, sampling=draw),
            ["Line"],
            max_new_tokens=150,
            seed=0,
            rolling_context=True,
            cfg_scale=1.0,
        )


def test_rows_that_leave_the_batch_have_the_same_text(model, canvases):
    prompts = [f"Line {i}" for i in range(5)]
    plain, compact = (
        pipeline.generate(model, canvases, prompts, max_new_tokens=48, seed=1, drop_finished=c) for c in (False, True)
    )
    assert plain.texts == compact.texts


# ---- logits processors ----


def test_processors_and_guidance_reach_every_sampler(model, draw):
    tokenizer, prompts = model.tokenizer, ["Line 1: the", "Line 2"]
    rule = SuppressTokens(tokens=tuple(tokenizer.encode("at").tolist()))
    samplers = [
        presets.autoregressive(model, sampling=draw),
        presets.confidence(model, sampling=draw, canvas_length=16, denoising_steps=4),
        presets.speculative(model, sampling=draw, break_even=0.0),
    ]
    for text_sampler in samplers:
        for text in pipeline.generate(
            model, text_sampler, prompts, max_new_tokens=20, seed=0, logits_processor=rule, cfg_scale=1.0
        ).texts:
            assert len(text) == 20 and not set(text) & set("at")
    text = pipeline.generate(
        model, samplers[0], [""], max_new_tokens=40, seed=0, logits_processor=NoRepeatNGram(size=3)
    ).texts[0]
    assert max(collections.Counter(text[i : i + 3] for i in range(38)).values()) == 1


# ---- many ----


def test_the_best_is_the_likeliest_of_all(model, canvases):
    chosen = best_of_n.best_of(
        model, canvases, ["Line 1", "Line 2: the"], 3, score=best_of_n.log_likelihood, max_new_tokens=20, seed=0
    )
    assert chosen.scores.shape == (2, 3) and (chosen.index == chosen.scores.argmax(axis=1)).all()
    assert chosen.texts == [chosen.output.texts[i * 3 + best] for i, best in enumerate(chosen.index)]


def test_log_likelihood_is_the_mean_log_probability_with_the_end(model, canvases):
    answer = pipeline.generate(model, canvases, ["Line 1", "Line 2: the"] * 4, max_new_tokens=12, seed=3)
    scores, ended, rows = best_of_n.log_likelihood(model, answer), 0, []
    for row in range(8):
        count = int(answer.generation.length[row])
        end = [model.tokenizer.eos] if count < 12 else []
        rows.append(
            np.concatenate([answer.prompt_ids[row], answer.generation.tokens[row, :count], end]).astype(np.int32)
        )
        ended += len(end)
    padded = np.stack([np.pad(row, (0, 40 - len(row))) for row in rows])  # what follows is not seen
    for row, score, nats in zip(range(8), scores, np.asarray(judged(model.network.denoise, padded)), strict=True):
        assert score == pytest.approx(-nats[len(answer.prompt_ids[row]) : len(rows[row])].mean(), abs=1e-4)
    assert 0 < ended < 8


def test_the_elbo_of_an_answer_does_not_depend_on_the_others(model, canvases):
    answer = pipeline.generate(model, canvases, ["Line 1", "Line 2: the"], max_new_tokens=20, seed=3)
    both = best_of_n.elbo(model, answer, draws=2)
    last = jax.tree.map(lambda a: a[1:] if a.ndim else a, answer.generation.replace(cache=None))
    one = answer._replace(texts=answer.texts[1:], prompt_ids=answer.prompt_ids[1:], generation=last)
    assert best_of_n.elbo(model, one, draws=2)[0] == pytest.approx(both[1], abs=1e-4)
    assert (both < 0).all() and both[0] != both[1]


def test_a_verifier_chooses(model, canvases):
    chosen = best_of_n.best_of(
        model,
        canvases,
        ["Line 1"],
        4,
        score=lambda _, answer: [t.count("e") for t in answer.texts],
        max_new_tokens=20,
        seed=0,
    )
    assert chosen.texts[0].count("e") == max(text.count("e") for text in chosen.output.texts)
    with pytest.raises(ValueError, match="number"):
        best_of_n.best_of(
            model, canvases, ["a"], 2, score=lambda _, answer: [0, float("nan")], max_new_tokens=4, seed=0
        )


def test_the_majority_wins_and_no_answer_is_none():
    assert best_of_n.majority_vote(["4", "5 ", "5", "7"]) == best_of_n.Vote("5 ", 0.5)
    assert best_of_n.majority_vote(["x", "a", "b"], key=lambda t: None if t == "x" else t) == best_of_n.Vote("a", 1 / 3)
    with pytest.raises(ValueError, match="vote"):
        best_of_n.majority_vote(["x"], key=lambda text: None)


def test_particles_generate_text(model, draw):
    plain = SamplingParams(suppressed=draw.suppressed)
    text_sampler = presets.particles(model, sampling=plain, canvas_length=16, denoising_steps=2, num_particles=3)
    answer = pipeline.generate(model, text_sampler, ["Line 1"] * 3 + ["Line 2"] * 3, max_new_tokens=40, seed=0)
    assert all(len(text) == 40 for text in answer.texts)
    nats = jnp.asarray(encode_prompts(model, ["Line 1"])[0])
    assert nats[0] == model.tokenizer.bos
    with pytest.raises(ValueError, match="particles"):
        pipeline.generate(model, text_sampler, ["Line 1"] * 3, max_new_tokens=40, seed=0, drop_finished=True)


@pytest.mark.parametrize("kind", ["autoregressive", "confidence"])
def test_logits_that_are_not_finite_are_an_error_and_no_text(model, draw, kind):
    options = {"canvas_length": 16, "denoising_steps": 4} if kind == "confidence" else {}
    params = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), model.network.params)
    broken = model._replace(network=model.network.replace(params=params), prepared={})
    with pytest.raises(ValueError, match="not finite"):
        pipeline.generate(
            broken, getattr(presets, kind)(model, sampling=draw, **options), [""], max_new_tokens=8, seed=0
        )
