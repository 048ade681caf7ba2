"""Cross-entropy, and every process's bound, without all logits at once are the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.nn import lm_head as readout_module
from diffusion_lm.nn.lm_head import ChunkedLogits, LogitsSpec
from diffusion_lm.objectives.distillation import kl_divergence
from diffusion_lm.processes.flow import UniformFlow
from diffusion_lm.processes.mixture import Mixture
from diffusion_lm.processes.score import AbsorbingScore, UniformScore
from diffusion_lm.processes.state_dependent import StateDependentMasking
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.types import Alignment, DenseLogits, cross_entropy


def arrays(length, batch=2, vocab=19, rows=32, width=8):
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(batch, length, width)), rng.normal(size=(rows, width))
    targets, weights = rng.integers(vocab, size=(batch, length)), rng.exponential(size=(batch, length))
    weights[:, ::3] = 0
    targets[:, ::3] = vocab  # the mask: allowed where nothing is scored
    return [jnp.asarray(a, dtype) for a, dtype in ((hidden, "f4"), (table, "f4"), (targets, "i4"), (weights, "f4"))]


def projection(hidden, table, vocab=19, compute_dtype="float32"):
    return ChunkedLogits(hidden=hidden, table=table, spec=LogitsSpec(vocab, compute_dtype), alignment=Alignment.SAME)


def all_logits(hidden, table, vocab=19):
    return DenseLogits(values=jnp.einsum("ble,ve->blv", hidden, table)[..., :vocab])


def chunked(hidden, table, targets, weights, **rest):
    return projection(hidden, table, **rest).cross_entropy(targets, weights)


def plain(hidden, table, targets, weights, vocab=19):
    return all_logits(hidden, table, vocab).cross_entropy(targets, weights)


def by_hand(hidden, table, targets, weights, vocab=19):
    scores = np.einsum("ble,ve->blv", *(np.asarray(a, np.float64) for a in (hidden, table)))[..., :vocab]
    log_p = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    total = 0.0
    for b, i in np.ndindex(*targets.shape):
        if weights[b, i]:
            total -= float(weights[b, i]) * log_p[b, i, int(targets[b, i])]
    return total


def chunks_of(monkeypatch, rows):
    """So that these short rows take several chunks, the last not a whole one."""
    monkeypatch.setattr(readout_module, "_CHUNK_ROWS", rows)


@pytest.mark.cases(2)
@pytest.mark.parametrize(("length", "rows"), [(1, 8), (7, 8), (8, 8), (13, 10), (13, 1), (13, 512)])
def test_value_and_gradients_are_the_plain_ones(monkeypatch, length, rows):
    chunks_of(monkeypatch, rows)
    args = arrays(length)
    value, gradients = jax.value_and_grad(chunked, argnums=(0, 1))(*args)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(*args)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(value, by_hand(*args), rtol=2e-6)
    np.testing.assert_allclose(chunked(*args), expected, rtol=2e-6)  # without gradients another path
    for g, e in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(g, e, atol=2e-5)


IN_STEPS = [Uniform(mask=19), Mixture(uniform=0.2, mask=19), UniformFlow(mask=19),
            StateDependentMasking(powers=tuple(np.linspace(0.5, 2.0, 19).tolist()), mask=19)]  # fmt: skip
SCORES = [AbsorbingScore(mask=19), UniformScore(mask=19)]


@pytest.mark.parametrize(
    ("process", "steps"),
    [(p, n) for p in (*IN_STEPS, *SCORES) for n in ((0, 3) if p in IN_STEPS else (0,))],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_every_processes_bound_and_its_gradients_are_the_plain_ones(monkeypatch, process, steps):
    """Of two rows of 13 positions in chunks of 5, over a table with rows that are no piece; the last step, too."""
    chunks_of(monkeypatch, 10)
    hidden, table, x0, weights = arrays(13)
    t = jnp.array([[1 / 3], [1.0]]) if steps else jnp.array([[0.3], [0.8]])
    xt = process.corrupt(jax.random.key(0), x0, t)

    def bound(said):
        return jax.value_and_grad(lambda *a: process.nelbo(said(*a), x0, xt, t, weights, steps), argnums=(0, 1))

    (value, gradients), (expected, expected_gradients) = (
        bound(said)(hidden, table) for said in (projection, all_logits)
    )
    assert jnp.isfinite(expected) and expected != 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(process.nelbo(projection(hidden, table), x0, xt, t, weights, steps), value, rtol=1e-5)
    for g, e in zip(gradients, expected_gradients, strict=True):
        assert jnp.isfinite(e).all() and (e != 0).any()
        np.testing.assert_allclose(g, e, atol=1e-5 * float(jnp.abs(e).max()))


def test_gradients_reach_weights_and_what_positions_share(monkeypatch):
    """As noise that is learned needs it."""
    chunks_of(monkeypatch, 10)
    hidden, table, x0, weights = arrays(13)
    t, powers = jnp.array([[0.3], [0.8]]), jnp.linspace(0.5, 2.0, 19)
    xt = StateDependentMasking(mask=19, powers=powers).corrupt(jax.random.key(0), x0, t)

    def bound(said):
        ask = lambda powers, weights: StateDependentMasking(mask=19, powers=powers).nelbo(said, x0, xt, t, weights, 0)  # noqa: E731
        return jax.grad(ask, argnums=(0, 1))(powers, weights)

    for g, e in zip(bound(projection(hidden, table)), bound(all_logits(hidden, table)), strict=True):
        assert jnp.isfinite(e).all() and (e != 0).any()
        np.testing.assert_allclose(g, e, atol=1e-5 * float(jnp.abs(e).max()))


def test_a_teacher_is_read_in_parts_and_gets_no_gradient(monkeypatch):
    chunks_of(monkeypatch, 10)
    hidden, table, _, weights = arrays(13)
    others = hidden[::-1], table[::-1]

    def apart(said):
        def loss(hidden, table, *others):
            return said(hidden, table).weighted_loss(kl_divergence, weights, teacher=said(*others))

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(hidden, table, *others)

    (value, gradients), (expected, expected_gradients) = apart(projection), apart(all_logits)
    assert expected > 1 and (gradients[0] != 0).any()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for g, e in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(g, e, atol=2e-5)
    assert all((g == 0).all() for g in gradients[2:])


def test_asked_in_parts_and_mixed(monkeypatch):
    chunks_of(monkeypatch, 10)
    hidden, table, targets, _ = arrays(13)
    here = targets % 2 == 0
    ask = lambda logits, more: jax.nn.softmax(logits)[..., :3] + more[..., None]  # noqa: E731
    one, other = (said(hidden, table).select(here, said(-hidden, table)) for said in (projection, all_logits))
    np.testing.assert_allclose(one.logits(), other.logits(), atol=1e-5)
    np.testing.assert_allclose(one.map_positions(ask, targets), other.map_positions(ask, targets), atol=1e-5)


def test_a_factor_on_the_loss_scales_gradients():
    args = arrays(9)
    once, thrice = (jax.grad(lambda h, k=k: k * chunked(h, *args[1:]))(args[0]) for k in (1.0, 3.0))
    np.testing.assert_allclose(3 * once, thrice, rtol=1e-5)


def test_nothing_scored_costs_and_moves_nothing():
    hidden, table, targets, weights = arrays(9)
    value, gradients = jax.value_and_grad(chunked, argnums=(0, 1))(hidden, table, targets, 0 * weights)
    assert value == 0 and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("scored", [0, 1, 5, 6, 26])
def test_chunks_without_a_scored_position_are_left_out(monkeypatch, scored):
    """And the rest is what it would be: 26 positions, wherever the scored ones are, in chunks of 5."""
    chunks_of(monkeypatch, 5)
    hidden, table, targets, _ = arrays(13)
    chosen = np.random.default_rng(scored).permutation(26)[:scored]
    weights = jnp.zeros(26).at[chosen].set(jnp.linspace(0.5, 2.0, scored)).reshape(2, 13)
    targets = jnp.where(weights == 0, 19, targets % 19)
    calls = []

    def counted(logits, targets):
        jax.debug.callback(lambda: calls.append(1))
        return cross_entropy(logits, targets)

    def loss(hidden, table, weights):
        return projection(hidden, table).weighted_loss(counted, weights, targets)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, table, weights)
    jax.effects_barrier()
    assert len(calls) == -(-scored // 5)
    expected, others = jax.value_and_grad(
        lambda h, t, w: all_logits(h, t).weighted_loss(cross_entropy, w, targets), argnums=(0, 1, 2)
    )(hidden, table, weights)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for g, e in zip(gradients, others, strict=True):
        np.testing.assert_allclose(g, e, atol=2e-5)


def test_padding_rows_of_the_table_count_for_nothing():
    hidden, table, targets, weights = arrays(9)
    other = table.at[19:].set(100.0)
    assert chunked(hidden, table, targets, weights) == chunked(hidden, other, targets, weights)
    gradient = jax.grad(chunked, argnums=1)(hidden, other, targets, weights)
    assert (gradient[19:] == 0).all() and jnp.isfinite(gradient).all()


def test_no_array_of_all_logits_exists(monkeypatch):
    chunks_of(monkeypatch, 16)
    args = arrays(64, vocab=300, rows=384)
    grad = jax.grad(lambda *a: chunked(*a, vocab=300), argnums=(0, 1))
    assert "f32[2,64,384]" not in str(jax.make_jaxpr(grad)(*args))
    assert "f32[1,16,384]" in str(jax.make_jaxpr(grad)(*args))


def test_bfloat16_is_near():
    args = arrays(40)
    np.testing.assert_allclose(chunked(*args, compute_dtype="bfloat16"), plain(*args), rtol=1e-2)


@pytest.mark.parametrize("kind", ["projection", "logits"])
def test_pick_takes_one_position_a_row(kind):
    hidden, table, *_ = arrays(5)
    said = projection(hidden, table).replace(alignment=Alignment.NEXT)
    if kind == "logits":
        said = DenseLogits(values=said.logits(), alignment=Alignment.NEXT)
    picked = said.gather(jnp.array([[4], [1]]))
    assert picked.alignment is Alignment.NEXT and picked.logits().shape == (2, 1, 19)
    expected = jnp.stack([said.logits()[0, 4], said.logits()[1, 1]])
    np.testing.assert_allclose(picked.logits()[:, 0], expected, atol=1e-5)
