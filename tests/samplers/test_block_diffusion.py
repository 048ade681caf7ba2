"""Generation by canvases: steps, ends of text, rows in a batch, and the compiled loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.canvas import recorded, step
from support.text_samplers import (
    NEVER,
    NO_TEXT,
    TEXT_SAMPLERS,
    _generate,
    auto,
    autoregressive,
    canvases,
    generate,
    prompts,
)
from support.tiny import EOS, MASK, VOCAB, model

from diffusion_lm.attention_patterns import BlockCausal, Causal
from diffusion_lm.samplers.ancestral import Ancestral
from diffusion_lm.samplers.base import Canvas, Prompt, commit
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.types import Alignment, DenseLogits


@pytest.fixture(params=TEXT_SAMPLERS, scope="module")
def text_sampler(request):
    return TEXT_SAMPLERS[request.param]


def generate_row(text_sampler, prompt, length, row, seed=0):
    """One row alone, without the batch's padding."""
    width = int(prompt.length[row])
    alone = Prompt(tokens=prompt.tokens[row : row + 1, :width], length=prompt.length[row : row + 1])
    keys = jax.random.split(jax.random.key(seed), 3)[row : row + 1]
    return _generate(text_sampler, model(), alone, keys, length)


@pytest.mark.cases(3)
@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in TEXT_SAMPLERS), ("confidence", 0.0)])
def test_a_row_alone_is_the_row_in_a_ragged_batch(name, temperature):
    sampler, prompt = TEXT_SAMPLERS[name](temperature=temperature), prompts([6, 1, 3])
    batch = generate(sampler, prompt, 10)
    alone = generate_row(sampler, prompt, 10, row=2)
    assert (alone.tokens[0] == batch.tokens[2]).all() and alone.length[0] == batch.length[2]


@pytest.mark.cases(2)
def test_only_text_is_returned_and_nothing_after_its_end(text_sampler):
    ended = 0
    for seed in range(4):
        generation = generate(text_sampler(temperature=1.5), prompts([6, 1, 3]), 10, seed)
        for tokens, length in zip(np.asarray(generation.tokens), np.asarray(generation.length), strict=True):
            assert not np.isin(tokens[:length], (*NO_TEXT, EOS, MASK)).any()
            assert (tokens[length:] == MASK).all()
            ended += length < 10
    assert ended >= 2  # or this test would have seen no end


@pytest.mark.cases(3)
def test_without_an_end_all_tokens_are_generated(text_sampler):
    generation = generate(text_sampler(eos=NEVER), prompts([6, 1, 3]), 10)
    assert (generation.length == 10).all() and (generation.tokens < VOCAB).all()


def test_the_same_keys_give_the_same_text_and_others_do_not(text_sampler):
    prompt = prompts([6, 1, 3])
    one, same, other = (generate(text_sampler(), prompt, 10, seed).tokens for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()


# Forward passes.


@pytest.mark.cases(2)
@pytest.mark.parametrize(("canvas", "passes", "per_canvas"), [(4, 1, 1), (4, 2, 2), (4, 3, 3), (4, 4, 4), (4, 50, 4)])
def test_passes_of_confidence(canvas, passes, per_canvas):
    """The prompt, the steps, and one pass that appends each canvas but the last. Spare steps aren't made."""
    generation = generate(canvases(canvas_length=canvas, denoising_steps=passes, eos=NEVER), prompts([2, 2, 2]), 12)
    assert generation.nfe == 1 + 3 * per_canvas + 2


def test_passes_of_other_samplers():
    prompt = prompts([6, 1, 3])
    assert generate(autoregressive(eos=NEVER), prompt, 10).nfe == 10
    both = canvases(canvas_length=20, align=0, denoising_steps=5, eos=NEVER)
    assert generate(both, prompt, 10).nfe == 5  # no prompt is read, nothing is committed
    blocks = canvases(clean=BlockCausal(4), align=4, denoising_steps=4, eos=NEVER)
    # prompts of 1 and 3 lie in the first canvas: 4 canvases for 10 tokens at worst, of which the last row needs 4
    assert generate(blocks, prompt, 10).nfe <= 1 + 4 * 4 + 3
    assert generate(canvases(kind=Ancestral, denoising_steps=1, eos=NEVER), prompt, 8).nfe == 1 + 2 + 1


class Ending:
    """A network that ends the text of row b after `after[b]` tokens; else it predicts 5."""

    def __init__(self, after):
        self.after = jnp.asarray(after, jnp.int32)

    def extend(self, cache, tokens, count, attention):
        at = cache[:, None] + 1 + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return DenseLogits(values=self._say(at), alignment=Alignment.NEXT), cache + count

    def truncate(self, cache, count):
        return cache - count

    def denoise_canvas(self, cache, canvas, t):
        return self._say(cache[:, None] + jnp.arange(canvas.shape[1], dtype=jnp.int32)[None])

    def _say(self, at):
        token = jnp.where(at == self.after[:, None], EOS, 5)
        return 100.0 * jax.nn.one_hot(token, VOCAB)


def ending(text_sampler, after, length=20):
    rows = len(after)
    prompt = Prompt(tokens=jnp.full((rows, 1), 1, jnp.int32), length=jnp.ones(rows, jnp.int32))
    keys = jax.random.split(jax.random.key(0), rows)
    return jax.jit(
        lambda keys: text_sampler.generate(
            Ending(after), jnp.zeros(rows, jnp.int32), prompt, keys, max_new_tokens=length
        )
    )(keys)


def test_generation_stops_when_every_row_has_ended():
    generation = ending(autoregressive(), [4, 2])
    assert generation.length.tolist() == [3, 1] and generation.nfe == 4
    assert generation.tokens[0, :5].tolist() == [5, 5, 5, MASK, MASK]
    generation = ending(canvases(canvas_length=4, denoising_steps=2), [6, 2])
    assert generation.length.tolist() == [5, 1] and (generation.tokens[1, 1:] == MASK).all()
    # prompt, a canvas, its commit, and the other row's end in the first pass of the next: what follows is closed
    assert generation.nfe == 1 + 2 + 1 + 1
    assert ending(canvases(canvas_length=4, denoising_steps=2), [2, 2]).nfe == 1 + 1  # the first pass meets the end


def test_an_end_at_once_and_an_end_at_the_last_token():
    for text_sampler in (autoregressive(), canvases(canvas_length=4, denoising_steps=2)):
        assert ending(text_sampler, [1, 1]).length.tolist() == [0, 0]
        assert ending(text_sampler, [20, 21]).length.tolist() == [19, 20]


@pytest.mark.cases(2)
def test_one_token_can_be_asked_for(text_sampler):
    generation = generate(text_sampler(eos=NEVER), prompts([6, 1, 3]), 1)
    assert generation.tokens.shape == (3, 1) and (generation.tokens < VOCAB).all()


# The loop, and what a step does.


@pytest.mark.parametrize("kind", ["autoregressive", "confidence", "auto"])
def test_the_compiled_loop_is_a_plain_loop(kind):
    """Each sampler's own steps, one at a time, in Python."""
    text_sampler, bound, prompt = TEXT_SAMPLERS[kind](), model(), prompts([6, 1, 3])

    def begin(keys):
        return text_sampler.init(
            bound, bound.empty_cache(3, text_sampler.slots(6, 10)), prompt, keys, max_new_tokens=10
        )

    state = jax.jit(begin)(jax.random.split(jax.random.key(0), 3))
    for phase in text_sampler.stages(10):
        state = phase.enter(bound, state) if phase.enter else state
        one_step, made = jax.jit(phase.stepper.step), 0
        while made < phase.max_steps and not phase.stepper.done(state).all():
            state, made = one_step(bound, state), made + 1
    looped, compiled = text_sampler.finish(state, max_new_tokens=10), generate(text_sampler, prompt, 10)
    assert (looped.tokens == compiled.tokens).all() and looped.nfe == compiled.nfe


def a_canvas(tokens, passes=0):
    tokens = jnp.asarray(tokens, jnp.int32)
    return Canvas(
        tokens=tokens,
        undecided=tokens == MASK,
        fixed=jnp.zeros_like(tokens, bool),
        confidence=jnp.zeros(tokens.shape),
        keys=jax.random.split(jax.random.key(0), len(tokens)),
        step=jnp.full((), passes, jnp.int32),
    )


@pytest.mark.cases(2)
@pytest.mark.parametrize("passes", [1, 3, 4, 8])
def test_a_canvas_denoised_step_by_step_in_python(passes):
    sampler = Confidence(denoising_steps=passes, eos=NEVER)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 8, VOCAB)), jnp.float32)
    canvas = a_canvas(np.full((2, 8), MASK))
    state, record = recorded(sampler, lambda tokens, t: logits, canvas, lambda s: s.tokens)
    for made in range(passes):
        assert not sampler.done(canvas).any()
        was, canvas = canvas, step(sampler, lambda tokens, t: logits, canvas)
        assert (canvas.tokens == was.tokens)[~was.undecided].all()  # committed tokens stay
        assert (record[made] == canvas.tokens).all()
    assert sampler.done(canvas).all() and (canvas.tokens == state.tokens).all() and (canvas.tokens < VOCAB).all()


def test_confidence_commits_evenly_many_of_the_most_certain():
    logits = jnp.zeros((1, 6, VOCAB)).at[0, :, 5].set(jnp.array([1.0, 6.0, 2.0, 5.0, 4.0, 3.0]))
    sampler = Confidence(denoising_steps=3, eos=NEVER, sampling=SamplingParams(temperature=0.0))
    canvas = step(sampler, lambda tokens, t: logits, a_canvas(np.full((1, 6), MASK)))
    assert canvas.tokens[0].tolist() == [MASK, 5, MASK, 5, MASK, MASK]
    canvas = step(sampler, lambda tokens, t: logits, canvas)
    assert canvas.tokens[0].tolist() == [MASK, 5, MASK, 5, 5, 5]


def test_commit_closes_positions_after_an_end_of_text():
    canvas = a_canvas([[MASK, 5, MASK, 6, MASK]])
    chosen = jnp.array([[False, True, True, False, False]])
    after = commit(canvas, chosen, jnp.full((1, 5), EOS), jnp.full((1, 5), 0.5), eos=EOS)
    assert after.tokens[0].tolist() == [MASK, 5, EOS, EOS, EOS]  # position 1 was not open
    assert after.undecided[0].tolist() == [True, False, False, False, False]
    assert after.confidence[0].tolist() == [0, 0, 0.5, 0, 0] and after.step == 1


def test_an_end_of_text_in_a_prompt_closes_nothing():
    canvas = a_canvas([[EOS, MASK, MASK]]).replace(fixed=jnp.array([[True, False, False]]))
    after = commit(canvas, canvas.undecided, jnp.full((1, 3), 5), jnp.ones((1, 3)), eos=EOS)
    assert after.tokens[0].tolist() == [EOS, 5, 5]


def test_fixed_tokens_after_an_end_of_text_stay():
    canvas = a_canvas([[MASK, MASK, 7, MASK]]).replace(fixed=jnp.array([[False, False, True, False]]))
    chosen = jnp.array([[True, False, False, False]])
    after = commit(canvas, chosen, jnp.full((1, 4), EOS), jnp.ones((1, 4)), eos=EOS)
    assert after.tokens[0].tolist() == [EOS, EOS, 7, EOS] and not after.undecided.any()


def test_history_holds_each_step_of_each_canvas():
    text_sampler = canvases(denoising_steps=3, record=True, eos=NEVER)
    generation = generate(text_sampler, prompts([2, 2, 2]), 8)
    history = generation.history
    assert history.tokens.shape == (2, 3, 3, 4) and history.steps.tolist() == [3, 3]
    assert history.start.tolist() == [[2] * 3, [6] * 3]
    assert (jnp.moveaxis(history.tokens[:, 2], 0, 1).reshape(3, 8) == generation.tokens).all()
    assert ((history.tokens == MASK).sum(axis=-1) == jnp.array([2, 1, 0])[None, :, None]).all()
    assert ((history.confidence > 0) == (history.tokens != MASK)).all()


def test_recording_changes_nothing():
    prompt = prompts([6, 1, 3])
    plain, recorded = (generate(canvases(record=record), prompt, 10) for record in (False, True))
    assert (plain.tokens == recorded.tokens).all() and plain.nfe == recorded.nfe


@pytest.mark.parametrize(
    "bad",
    [
        lambda: canvases(denoising_steps=0),
        lambda: canvases(denoising_steps=-3, kind=Ancestral),
        lambda: canvases(canvas_length=0),
        lambda: canvases(canvas_length=6, align=4),
        lambda: canvases(align=-1),
        lambda: canvases(canvas_length=8, align=1, clean=BlockCausal(4)),
        lambda: generate(canvases(canvas_length=8, align=0, clean=Causal()), prompts([6, 1, 3]), 10),
    ],
)
def test_impossible_values_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        bad()
    assert "\n" not in str(error.value)


# Auto.


@pytest.mark.parametrize("length", [3, 8])
def test_auto_is_the_cheaper_sampler_where_one_always_is(length):
    prompt = prompts([6, 1, 3])
    dear, cheap = (generate(auto(step_s=s), prompt, length, seed=2) for s in (100.0, 1e-3))
    assert (dear.tokens == generate(canvases(denoising_steps=2), prompt, length, seed=2).tokens).all()
    assert (cheap.tokens == generate(autoregressive(), prompt, length, seed=2).tokens).all()
    assert (auto(step_s=100.0).width(length), auto(step_s=1e-3).width(length)) == (4, 1)


def test_auto_continues_token_by_token_as_autoregression_would():
    """Two canvases, then what autoregression samples after the same text with the same cache."""
    prompt = prompts([6, 1, 3])
    whole = generate(auto(eos=NEVER, temperature=0.0), prompt, 10)
    assert (whole.length == 10).all()
    first = generate(canvases(denoising_steps=2, eos=NEVER, temperature=0.0), prompt, 8).tokens
    assert (whole.tokens[:, :8] == first).all()
    text = [jnp.concatenate([prompt.tokens[i, : prompt.length[i]], first[i]]) for i in range(3)]
    longer = Prompt(
        tokens=jnp.stack([jnp.pad(row, (0, 14 - len(row))) for row in text]),
        length=jnp.asarray([len(row) for row in text], jnp.int32),
    )
    rest = generate(autoregressive(eos=NEVER, temperature=0.0), longer, 2)
    assert (whole.tokens[:, 8:] == rest.tokens).all()


def test_auto_continues_where_the_canvases_ended():
    """Token by token after two canvases, in the row that has not ended: the last token is appended once."""
    generation = ending(auto(), [6, 10], length=10)
    assert generation.length.tolist() == [5, 9]
    assert generation.cache.tolist() == [1 + 4, 1 + 9]  # canvases that ended, and ends, are not read


def test_auto_ends_with_a_narrow_canvas_where_that_is_faster():
    """2 passes over 3 positions at 0.9 cost less than 3 steps at 0.8."""
    prompt, plain = prompts([6, 1, 3]), canvases(denoising_steps=2)
    assert (generate(auto(), prompt, 11, seed=2).tokens == generate(plain, prompt, 11, seed=2).tokens).all()


def test_a_short_answer_does_not_pay_for_a_canvas():
    """The last canvas is as wide as what is left: no pass has more than 3 positions here."""
    generation = generate(canvases(canvas_length=16, denoising_steps=16, eos=NEVER), prompts([6, 1, 3]), 3)
    assert (generation.length == 3).all() and generation.nfe == 1 + 3
