"""Adapters: clean text keeps the base's numbers, nothing frozen moves, and runs stop and go on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import small
from support.begun import config_of, drawn, trained

from diffusion_lm.attention_patterns import BlockDiffusionTraining, Causal
from diffusion_lm.build import build, load_for_inference
from diffusion_lm.config import override
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.nn.lora import LoRA, is_adapter
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.training.adapters import adapters_of, folded, joined
from diffusion_lm.training.loop import run
from diffusion_lm.training.metrics import read as read_metrics

NOISY, ALL = LoRA(rank=3, alpha=6.0), LoRA(rank=3, alpha=6.0, where="all")
SPEC = small.SPECS["grouped, untied, timed"]
same = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def adapted(lora):
    """A small network, with random adapters."""
    base = small.bound(SPEC)
    module = base.module.clone(lora=lora)
    from diffusion_lm.models.transformer import init_params

    abstract = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    rng = np.random.default_rng(1)
    boxed = adapters_of(abstract)
    adapters = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), boxed)
    import flax.linen as nn

    return base, BoundModel(module=module, params=joined(base.params, nn.meta.unbox(adapters)))


def test_clean_text_of_a_training_pass_is_the_base_bit_for_bit():
    """And the noisy half is not."""
    base, network = adapted(NOISY)
    attention, tokens = BlockDiffusionTraining(4, Causal()), small.rows(8)
    noisy = jnp.where(jnp.arange(8)[None] % 3 == 0, small.MASK, tokens)
    row, t = jnp.concatenate([noisy, tokens], axis=1), jnp.zeros((2, 4))
    ours, theirs = (small.read(n, row, attention, t=t, length=8) for n in (network, base))
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert np.abs(ours[0] - theirs[0]).max() > 0.1


def test_gradients_of_gated_adapters_are_whole():
    """No gradient is computed at clean positions, and none is missing: it is the slope of the loss."""
    base, network = adapted(NOISY)
    attention, tokens = BlockDiffusionTraining(4, Causal()), small.rows(8)
    row, t = jnp.concatenate([jnp.full_like(tokens, small.MASK), tokens], axis=1), jnp.zeros((2, 4))
    found, rng = adapters_of(network.params), np.random.default_rng(3)
    way = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), found)

    @jax.jit
    def loss(step):
        moved = joined(base.params, jax.tree.map(lambda a, d: a + step * d, found, way))
        heads = BoundModel(module=network.module, params=moved).denoise(
            row, t, attention=attention, positions=jnp.arange(8, dtype=jnp.int32)[None], segment_ids=None
        )
        return sum(jnp.mean(jax.nn.log_softmax(head.logits()[..., : small.VOCAB])[..., 0]) for head in heads)

    step = 1e-3
    slope = (loss(step) - loss(-step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), slope, rtol=5e-3)


def test_clean_text_of_a_cache_is_the_base_bit_for_bit():
    """Text that is appended, and text that drafts follow; canvases and drafts are adapted."""
    base, network = (n.for_sampling() for n in adapted(NOISY))
    tokens, count = small.rows(5), jnp.array([5, 3])

    @jax.jit
    def passes(network):
        head, cache = network.extend(network.empty_cache(2, 16), tokens, count, Causal())
        text, drafts, after = network.draft_and_verify(cache, tokens[:, :2], jnp.array([2, 1]), 3)
        canvas = network.denoise_canvas(cache, jnp.full((2, 4), small.MASK), jnp.ones(2))
        return (head.logits(), cache, text.logits(), after), (drafts.logits(), canvas)

    (clean, noisy), (base_clean, base_noisy) = passes(network), passes(base)
    same(clean, base_clean)
    assert all(np.abs(one - other).max() > 0.1 for one, other in zip(noisy, base_noisy, strict=True))


def test_adapters_of_all_positions_fold_into_their_base():
    base, network = adapted(ALL)
    params = folded(network.params, ALL, small.MASK)
    assert jax.tree.structure(params) == jax.tree.structure(base.params)
    tokens = small.rows(8).at[:, 3].set(small.MASK)
    whole, theirs, plain = (
        small.read(n, tokens, Causal()) for n in (network, base.replace(params=params), base)
    )  # fmt: skip
    np.testing.assert_allclose(whole, theirs, atol=2e-4)
    assert np.abs(whole - plain).max() > 0.1


@pytest.fixture(scope="module")
def joint(converted, lines, tmp_path_factory):
    """A joint run of adapters beside the converted model."""
    home = tmp_path_factory.mktemp("joint")
    config = config_of(lines, Joint(block_size=4), trainable=NOISY, init=str(converted[0]), steps=4)
    return config, home, trained(config, home)


def test_frozen_parameters_have_no_gradient_and_no_state(joint, converted, tmp_path):
    """What is trained, averaged and kept by the optimizer is the adapters' size; the base is a constant as stored."""
    config, _, model = joint
    made = build(dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=0.5)), tmp_path / "run")
    abstract, base = made.job.abstract, made.job.constants["base"]
    bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    names = [path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(abstract.params)[0]]
    assert all(map(is_adapter, names))
    counts = 8  # Adam's and the schedule's numbers of updates
    assert bytes_of(abstract.opt_state) == 2 * bytes_of(abstract.params) + counts
    assert bytes_of(abstract.ema_params) == bytes_of(abstract.params)
    stored = converted[1].network.params
    assert bytes_of(base) == bytes_of(stored)
    before = jax.tree.map(np.asarray, base)
    run(made.job, made.config.train, tmp_path / "run", made.checkpoints)
    same(before, base)
    frozen = {name: value for name, value in model.network.params.items() if name in ("embedding", "final_norm")}
    same(frozen, {name: stored[name] for name in frozen})
    moved = adapters_of(model.network.params)
    assert np.abs(moved["layer_0"]["attention"]["query_lora_b"]).max() > 0


def test_killed_and_resumed_is_uninterrupted(joint, tmp_path):
    """Bit for bit, from the last checkpoint before the kill."""
    config, home, model = joint
    made = build(config, tmp_path)

    class Killed(Exception):
        pass

    class Dying:
        get_state, set_state, left = made.job.batches.get_state, made.job.batches.set_state, 3

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return next(made.job.batches)

    with pytest.raises(Killed):
        run(dataclasses.replace(made.job, batches=Dying()), made.config.train, tmp_path, made.checkpoints)
    again = trained(config, tmp_path)
    same(again.network.params, model.network.params)
    assert read_metrics(tmp_path)[-1] == read_metrics(home)[-1]


def test_a_base_that_moved_or_changed(joint, converted, causal, tmp_path):
    """Adapters know their base: by its path first, and by what it holds."""
    config, home, model = joint
    base, gone = converted[0], tmp_path / "gone"
    base.rename(gone)
    try:
        with pytest.raises(FileNotFoundError, match=r"the adapters' base .* is gone"):
            load_for_inference(home)
        moved = override(config, [f"train.init={gone}"])
        assert build(moved, home).checkpoints.steps()[-1] == 4
        base.symlink_to(causal[0])
        with pytest.raises(ValueError, match="has changed since they were trained") as error:
            load_for_inference(home)
        assert "\n" not in str(error.value)
        base.unlink()
    finally:
        gone.rename(base)
    same(load_for_inference(home).network.params, model.network.params)


def test_adapters_beside_a_run_of_ours_in_bfloat16_products(causal, lines, tmp_path):
    """Layers stay stacked, as the base's are; where=all trains autoregression."""
    config = config_of(lines, AutoregressiveLoss(), trainable=ALL, init=str(causal[0]))
    model = drawn(config, tmp_path)
    assert model.network.module.scan and model.network.module.lora == ALL
    assert model.network.params["layers"]["mlp"]["down_lora_a"].shape == (2, 16, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": None}, "needs a network to be trained beside: --set=train.init=WORKDIR"),
        ({"objective": AutoregressiveLoss()}, "no noisy positions.*set trainable.where=all"),
        (
            {"model": DenoiserSpec(width=16, layers=2, heads=2, mlp_dim=16, time_conditioning=True)},
            "adaln/kernel, which adapters leave as it was drawn",
        ),
    ],
)
def test_what_adapters_cannot_do_is_one_line(causal, lines, tmp_path, change, message):
    settings = {"objective": Joint(block_size=4), "init": str(causal[0]), "trainable": NOISY} | change
    with pytest.raises(ValueError, match=message) as error:
        build(config_of(lines, **settings), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_adapters_are_no_base(joint, lines, tmp_path):
    with pytest.raises(ValueError, match="holds adapters: fold them"):
        build(config_of(lines, Joint(block_size=4), init=str(joint[1])), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"targets": ("head",)}, "head is none of"),
        ({"where": "x"}, "where"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**fields)
