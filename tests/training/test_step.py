import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import toy

from diffusion_lm.training.loop import Train
from diffusion_lm.training.step import Stages, make_step


def assert_same(a, b, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance) if tolerance else np.testing.assert_array_equal, a, b)


def one_step(train, loss=toy.loss, rows=12, state=None):
    job = toy.job(train, loss)
    batch = jax.tree.map(lambda x: x[None], toy.batch_at(0, rows))
    return job.step(job.initial() if state is None else state, job.key, job.put(batch), ())


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulation_equals_one_big_batch(parts):
    """Though the micro-batches have different numbers of targets."""
    whole, whole_metrics = one_step(Train(batch_size=12))
    state, metrics = one_step(Train(batch_size=12, grad_accum_steps=parts))
    assert_same(state, whole, rtol=2e-5, atol=1e-7)
    assert_same(metrics, whole_metrics, rtol=1e-6)


def test_micro_batches_draw_different_noise():
    """With one key for all, rows that are equal would have equal losses."""
    seen = []

    def loss(params, key, batch, constants):
        jax.debug.callback(lambda x: seen.append(float(x)), jax.random.uniform(key))
        return toy.loss(params, key, batch)

    with jax.debug_key_reuse(False):
        jax.block_until_ready(one_step(Train(batch_size=12, grad_accum_steps=4), loss))
    assert len(set(seen)) == 4


def test_gradient_norm_is_of_the_mean_loss_and_before_clipping():
    state = toy.job(Train()).initial()
    batch = jax.tree.map(jnp.asarray, toy.batch_at(0, 12))
    grads = jax.grad(lambda params: toy.loss(params, jax.random.key(0), batch)["next"].mean)(state.params)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    clipped = dataclasses.replace(toy.OPTIM, grad_clip_norm=norm / 10)
    step = make_step(toy.loss, clipped.build(10, state.params), clipped.rate(10))
    _, metrics = step(state, jax.random.key(2), batch, ())
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_running_average():
    job = toy.job(train := Train(batch_size=4, ema_decay=0.75))
    state = job.initial()
    average = jax.tree.map(np.asarray, state.params)
    for i in range(3):
        state, _ = job.step(state, job.key, job.put(jax.tree.map(lambda x: x[None], toy.batch_at(i))), ())
        average = jax.tree.map(
            lambda a, p: train.ema_decay * a + (1 - train.ema_decay) * np.asarray(p), average, state.params
        )
    assert_same(state.ema_params, average, rtol=1e-6)
    assert toy.job(Train(batch_size=4)).initial().ema_params is None


def test_several_updates_in_one_call_equal_them_one_by_one():
    noisy = partial(toy.loss, noise=0.3)
    job = toy.job(Train(batch_size=4, ema_decay=0.9), noisy)
    batches = [toy.batch_at(i) for i in range(6)]
    apart = job.initial()
    rows = []
    for batch in batches:
        apart, metrics = job.step(apart, job.key, job.put(jax.tree.map(lambda x: x[None], batch)), ())
        rows.append(metrics)
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    together, metrics = job.step(job.initial(), job.key, job.put(stacked), ())
    assert_same(together, apart)
    assert_same(metrics, jax.tree.map(lambda *xs: jnp.concatenate(xs), *rows))


@pytest.mark.parametrize("parts", [1, 2])
def test_stages_train_in_turn(parts):
    """Each update takes the gradient of its stage's loss, in one call over the change as in calls of one update."""

    def last(params, key, batch, constants):  # as a shorter draft: a loss of other shapes
        return toy.loss(params, key, batch.replace(tokens=batch.tokens[:, 4:], loss_mask=batch.loss_mask[:, 4:]))

    train = Train(batch_size=4, grad_accum_steps=parts)
    apart = {loss: toy.job(train, loss) for loss in (last, toy.loss)}
    state, rows = apart[last].initial(), []
    for i in range(5):
        job = apart[last if i < 2 else toy.loss]
        state, metrics = job.step(state, job.key, job.put(toy.stacked(i)), ())
        rows.append(metrics)
    job = toy.job(train, Stages(ends=(2,), losses=(last, toy.loss)))
    batches = jax.tree.map(lambda *xs: jnp.concatenate(xs), *[toy.stacked(i) for i in range(5)])
    together, metrics = job.step(job.initial(), job.key, job.put(batches), ())
    assert_same(together, state, rtol=1e-6)
    assert_same(metrics, jax.tree.map(lambda *xs: jnp.concatenate(xs), *rows), rtol=1e-6)


def test_the_state_is_donated():
    job = toy.job(Train(batch_size=4))
    state = job.initial()
    job.step(state, job.key, job.put(jax.tree.map(lambda x: x[None], toy.batch_at(0))), ())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_not_finite_is_flagged(bad):
    def loss(params, key, batch, constants):
        return jax.tree.map(lambda x: x * bad, toy.loss(params, key, batch))

    assert float(one_step(Train(batch_size=12))[1]["finite"][0]) == 1
    assert float(one_step(Train(batch_size=12), loss)[1]["finite"][0]) == 0
