import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.training.optimizer import AdamW, Muon, WarmupCosine, WarmupStableDecay, decayed


@pytest.mark.parametrize(
    ("schedule", "corners"),
    [
        (WarmupCosine(warmup=4, final=0.1), {0: 0.2, 3: 0.8, 4: 1.0, 9: 0.55 + 0.45 * np.cos(np.pi / 3), 19: 0.1}),
        (WarmupCosine(warmup=0, final=0.0), {0: 1.0, 19: 0.0}),
        (WarmupStableDecay(warmup=4, decay=5, final=0.2), {0: 0.2, 4: 1.0, 14: 1.0, 15: 0.84, 19: 0.2}),
        (WarmupStableDecay(warmup=0, decay=0, final=0.0), {0: 1.0, 19: 1.0}),
    ],
)
def test_schedule_at_its_corners(schedule, corners):
    for step, value in corners.items():
        np.testing.assert_allclose(schedule(jnp.int32(step), 20), value, atol=1e-6)


def gradient_step(optim, params, grads):
    chain = optim.build(10, params)
    params, grads = nn.meta.unbox(params), nn.meta.unbox(grads)
    updates, _ = chain.update(grads, chain.init(params), params)
    return updates


def test_first_step_is_the_learning_rate_times_sign_and_decay():
    params = {"w": jnp.full((2, 2), 3.0), "b": jnp.full((2,), 3.0)}
    grads = {"w": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "b": jnp.array([1.0, -1.0])}
    optim = AdamW(lr=0.1, schedule=WarmupCosine(warmup=0), weight_decay=0.5, grad_clip_norm=0.0, eps=1e-12)
    updates = gradient_step(optim, params, grads)
    np.testing.assert_allclose(updates["w"], -0.1 * (np.sign(grads["w"]) + 0.5 * 3.0), rtol=1e-5)
    np.testing.assert_allclose(updates["b"], -0.1 * np.sign(grads["b"]), rtol=1e-5)


def test_clipping_scales_the_whole_gradient_and_only_when_it_is_too_long():
    params = {"w": jnp.zeros((2,)), "v": jnp.zeros((2,))}
    grads = {"w": jnp.array([3.0, 0.0]), "v": jnp.array([0.0, 4.0])}  # norm 5

    def first_moment(clip):
        chain = AdamW(grad_clip_norm=clip, b1=0.0).build(10, params)
        _, state = chain.update(grads, chain.init(params), params)
        return state[1].mu

    np.testing.assert_allclose(first_moment(1.0)["w"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(first_moment(1.0)["v"], [0.0, 0.8], rtol=1e-6)
    np.testing.assert_allclose(first_moment(6.0)["v"], [0.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(first_moment(0.0)["v"], [0.0, 4.0], rtol=1e-6)


def test_stacked_vectors_do_not_decay():
    box = nn.LogicallyPartitioned
    params = {
        "norm": box(jnp.ones((3, 4)), names=("layers", "embed")),
        "matrix": box(jnp.ones((3, 4, 5)), names=("layers", "embed", "mlp")),
        "table": jnp.ones((4, 5)),
        "bias": jnp.ones((4,)),
    }
    assert decayed(params) == {"norm": False, "matrix": True, "table": True, "bias": False}
    updates = jax.eval_shape(lambda: AdamW().build(10, params).init(params))  # boxes and mask go together
    assert updates


def layers_of(rng):
    """Matrices of three layers, boxed as a network's are, and what is none."""
    shapes = {
        "query": ((3, 8, 2, 4), ("layers", "embed", "heads", "head_dim")),
        "gate_up": ((3, 8, 2, 12), ("layers", "embed", None, "mlp")),
        "down": ((3, 12, 8), ("layers", "mlp", "embed")),
        "embedding": ((16, 8), ("vocab", "embed")),
        "norm": ((3, 8), ("layers", "embed")),
    }
    return {n: nn.LogicallyPartitioned(jnp.asarray(rng.normal(size=s)), names=a) for n, (s, a) in shapes.items()}


def test_muon_moves_every_matrix_in_all_its_directions_alike():
    """Singular values of an update lie around 1 (Newton-Schulz with these numbers: 0.7 to 1.2), times 0.2 sqrt(longer
    side): whatever the gradient's. All else moves as AdamW moves it."""
    rng = np.random.default_rng(0)
    params = layers_of(rng)
    optim = {"lr": 0.1, "schedule": WarmupCosine(warmup=0), "weight_decay": 0.0}
    grads = jax.tree.map(lambda p: p * 10.0 ** rng.uniform(-3, 3), params)
    updates, adams = (gradient_step(kind(**optim), params, grads) for kind in (Muon, AdamW))
    for name in ("embedding", "norm"):
        np.testing.assert_array_equal(updates[name], adams[name])
    matrices = {
        "query": updates["query"].reshape(3, 8, 8),
        "gate_up": jnp.moveaxis(updates["gate_up"], 2, 1),
        "down": updates["down"],
    }
    for found in matrices.values():
        values = np.linalg.svd(found, compute_uv=False) / (0.1 * 0.2 * np.sqrt(max(found.shape[-2:])))
        assert (values < 1.3).all() and (values > 0.6).mean() > 0.9  # five iterations don't reach the smallest


def test_muons_momentum_is_nesterovs():
    """The direction after two gradients is that of one gradient of their weighted sum."""
    rng = np.random.default_rng(1)
    boxed, params, first, second = (layers_of(rng), *(nn.meta.unbox(layers_of(rng)) for _ in range(3)))
    optim = Muon(momentum=0.9, grad_clip_norm=0.0)

    def last(*grads):
        chain = optim.build(10, boxed)
        state = chain.init(params)
        for grad in grads:
            updates, state = chain.update(grad, state, params)
        return updates["down"]

    # m_2 = 0.9 * 0.1 g_1 + 0.1 g_2, then 0.9 m_2 / (1 - 0.9^3) + 0.1 g_2 / (1 - 0.9^2)
    ahead = 0.9 / (1 - 0.9**3)
    mixed = jax.tree.map(lambda a, b: ahead * 0.09 * a + (ahead * 0.1 + 0.1 / (1 - 0.9**2)) * b, first, second)
    decay = optim.weight_decay * params["down"]
    rates = [float(optim.rate(10)(jnp.int32(step))) for step in (0, 1)]
    alone = last(mixed) / rates[0] + decay
    np.testing.assert_allclose(last(first, second) / rates[1] + decay, alone, atol=1e-4)


@pytest.mark.parametrize("momentum", [1.0, -0.1])
def test_a_momentum_that_makes_no_sense(momentum):
    with pytest.raises(ValueError, match=r"optim\.momentum"):
        Muon(momentum=momentum)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"b2": 1.0},
        {"weight_decay": -1.0},
        {"grad_clip_norm": -1.0},
    ],
)
def test_values_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=f"optim.*{next(iter(wrong))}"):
        AdamW(**wrong)
