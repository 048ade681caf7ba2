import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.training.optimizer import AdamW, WarmupCosine, WarmupStableDecay, decayed


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
