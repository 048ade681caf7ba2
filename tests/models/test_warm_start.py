"""A run that begins with another's parameters: what is taken over, fresh and left, for each kind of network."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import small
from support.begun import config_of, drawn, trained

from diffusion_lm.attention_patterns import BlockDiffusionTraining, Causal
from diffusion_lm.build import build
from diffusion_lm.config import override
from diffusion_lm.models.base import DenoiserSpec, FromInit
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint


def unstacked_leaves(model, params):
    """Our stacked layers, each beside the base's own."""
    if model.network.module.scan:
        return [(params, model.network.params)]
    return [(jax.tree.map(lambda a, i=i: a[i], params["layers"]), model.network.params[f"layer_{i}"]) for i in range(2)]


def check_begun(model, params):
    """Everything is the base's but the mask's row, which is the mean of all tokens'."""
    size, mask = model.network.module.vocabulary.size, model.tokenizer.mask
    own, table = np.asarray(params["embedding"]), np.asarray(model.network.params["embedding"], np.float32)
    np.testing.assert_allclose(own[mask], table[:size].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(np.delete(own, mask, axis=0), np.delete(table, mask, axis=0))
    for ours, theirs in unstacked_leaves(model, params):
        drop = {"embedding"}
        ours, theirs = ({k: v for k, v in tree.items() if k not in drop} for tree in (ours, theirs))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "objective", [Joint(block_size=4), BlockELBO(block_size=4), ELBO()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("base", ["causal", "converted"])
def test_any_objective_begins_with_a_causal_network(base, objective, lines, tmp_path, request, caplog):
    workdir, model = request.getfixturevalue(base)
    config = config_of(lines, objective, init=str(workdir))
    with caplog.at_level(logging.INFO):
        made = build(config, tmp_path / "run")
    rows = {line.split("  ")[1]: line for record in caplog.records for line in record.message.splitlines()[1:]}
    width = model.config.model.width
    total = sum(leaf.size for leaf in jax.tree.leaves(model.network.params))
    assert f"{total - width:,}" in rows["taken over"] and f"{width:,}  the mask's embedding" in rows["fresh"]
    assert rows["left"].split() == ["left", "0"]
    assert made.data.tokenizer == model.tokenizer and made.config.model == model.config.model
    check_begun(model, made.job.initial().params)


@pytest.mark.parametrize("base", ["causal", "converted"])
def test_with_a_shifted_head_a_canvas_begins_as_the_causal_text_goes_on(base, lines, tmp_path, request):
    """Before the first update."""
    workdir, old = request.getfixturevalue(base)
    model = drawn(config_of(lines, Joint(block_size=4), FromInit(logit_shift=True), init=str(workdir)), tmp_path)
    assert model.config.model == dataclasses.replace(old.config.model, logit_shift=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 8, (2, 8)), jnp.int32)
    row = jnp.concatenate([jnp.full_like(tokens, old.tokenizer.mask), tokens], axis=1)
    noisy, clean = small.read(model.network, row, BlockDiffusionTraining(4, Causal()), t=jnp.ones((2, 4)), length=8)
    first, second, after, later = (
        jax.nn.log_softmax(a[..., :8]) for a in (noisy[:, 4], noisy[:, 5], clean[:, 3], clean[:, 4])
    )
    np.testing.assert_allclose(first, after, atol=1e-5)
    assert np.abs(second - later).max() > 1e-3  # it doesn't see the token before it


def test_it_trains_resumes_and_is_loaded_without_its_base(converted, lines, tmp_path):
    """After the first checkpoint nothing of the base is read: it may be gone."""
    config = config_of(lines, Joint(block_size=4), init=str(converted[0]))
    model = trained(config, tmp_path / "run")
    assert model.step == 2 and model.config.model == converted[1].config.model
    moved = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    held = converted[0].rename(tmp_path / "gone")
    try:
        assert trained(moved, tmp_path / "run").step == 4
    finally:
        held.rename(converted[0])
    with pytest.raises(ValueError, match=r"train\.init=None"):
        build(override(moved, ["train.init=none"]), tmp_path / "run")


def test_inputs_that_are_added_or_taken_away(causal, lines, tmp_path, caplog):
    """Time and a previous prediction are inputs that a network can be given later, and lose again."""
    workdir, model = causal
    more = dataclasses.replace(model.config.model, time_conditioning=True, self_conditioning=True)
    home = tmp_path / "timed"
    with caplog.at_level(logging.INFO):
        timed = drawn(config_of(lines, ELBO(), more, init=str(workdir)), home)
    assert "the mask's embedding, adaln, self_conditioning, time_in, time_out" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        made = build(config_of(lines, ELBO(), model.config.model, init=str(home)), tmp_path / "plain")
    left = next(line for line in caplog.text.splitlines() if line.startswith("  left"))
    assert "adaln, self_conditioning, time_in, time_out" in left
    embedding = made.job.initial().params["embedding"]  # its mask was trained: the row is taken over as it is
    np.testing.assert_array_equal(embedding, timed.network.params["embedding"])


def test_a_student_of_a_masked_run(causal, lines, tmp_path):
    workdir, _ = causal
    drawn(config_of(lines, ELBO(), init=str(workdir)), tmp_path / "masked")
    taught = Distillation(objective=ELBO(), teacher=str(tmp_path / "masked"))
    made = build(config_of(lines, taught, init=str(tmp_path / "masked")), tmp_path / "student")
    jax.tree.map(np.testing.assert_array_equal, made.job.initial().params, made.job.constants["teacher"].params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": None}, r"FromInit\(\) is the network of another run: --set=train.init=WORKDIR"),
        ({"init": "nowhere"}, "nowhere/checkpoints holds no checkpoint"),
        (
            {"model": DenoiserSpec(width=32, layers=2, heads=2, mlp_dim=16)},
            r"is a network of another width, groups: set",
        ),
        ({"model": DenoiserSpec(width=16, layers=3, heads=2, mlp_dim=16)}, "is a network of another groups"),
        ({"model": DenoiserSpec(width=16, layers=2, heads=2, mlp_dim=16, tie_embeddings=False)}, "tie_embeddings"),
    ],
)
def test_what_does_not_fit_is_one_line(causal, lines, tmp_path, settings, message):
    config = config_of(lines, Joint(block_size=4), **({"init": str(causal[0])} | settings))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        build(config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(causal, lines, tmp_path):
    """The tokenizer is the base's; one that the config names must be the same."""
    from diffusion_lm.data.tokenizer import train_tokenizer

    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["something else"], vocab=400, kind="char").proto)
    config = override(config_of(lines, ELBO(), init=str(causal[0])), [f"data.tokenizer={other}"])
    with pytest.raises(ValueError, match="is not the checkpoint's tokenizer"):
        build(config, tmp_path / "run")
