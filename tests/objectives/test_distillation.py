"""Distillation through time, on all canvases of a small world: what a student learns is what more passes say."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chain
from support.oracle import LENGTH, MASK, TEXTS, VOCAB, batch_of, truth
from support.small import module_of
from support.vectors import PROCESS as GAUSSIAN
from support.vectors import Seer

from diffusion_lm.layouts import WholeRow
from diffusion_lm.models.base import DenoiserSpec, Execution
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from diffusion_lm.nn import lm_head as readout_module
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.base import Objective
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.types import DenseLogits

ROWS = 20_000


class Tabled:
    """`types.Denoise` of a process, from `chain`'s table of a wrong denoiser at each of `passes` times."""

    def __init__(self, process, teacher_steps):
        tables = [chain.wrong_denoiser(process, (i + 1) / teacher_steps) for i in range(teacher_steps)]
        self.tables, self.teacher_steps = np.stack(tables).astype(np.float32), teacher_steps

    def __call__(self, tokens, t, **where):
        code = jnp.sum(tokens * jnp.asarray([64, 16, 4, 1])[None], axis=1)
        at = jnp.round(t[:, 0] * self.teacher_steps).astype(jnp.int32) - 1
        return DenseLogits(values=jnp.asarray(self.tables)[at, code])


def marginals(law) -> np.ndarray:
    """[81] -> [4, 3]."""
    return np.einsum("n,niv->iv", law / law.sum(), np.eye(VOCAB)[TEXTS])


def side_by_side(said) -> np.ndarray:
    """[4, 3] -> [81]: the law of one pass."""
    return np.prod(np.take_along_axis(said[None].repeat(81, 0), TEXTS[..., None], axis=-1)[..., 0], axis=1)


def divergence(p, q) -> float:
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def learned(process, teacher, *, teacher_steps, start, rows=ROWS):
    """What a student whose logits are the same everywhere learns to say in one pass: its loss, less its gradient."""
    objective = Distillation(objective=ELBO(), teacher="t", student_steps=1, teacher_steps=teacher_steps)
    texts = np.random.default_rng(0).choice(81, size=rows, p=truth())

    def loss(logits):
        def student(tokens, t, **where):
            return DenseLogits(values=jnp.broadcast_to(logits[None], (*tokens.shape, VOCAB)))

        return objective(student, process, jax.random.key(1), batch_of(TEXTS[texts]), teacher=teacher)["canvas"].sum

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(start, jnp.float32))
    return float(value) / rows, np.asarray(jax.nn.softmax(jnp.asarray(start))) - np.asarray(gradient) / rows


@pytest.mark.parametrize("process", [Absorbing(mask=MASK), Uniform(mask=MASK)], ids=["masks", "uniform"])
def test_one_pass_of_the_student_is_nearer_to_two_of_the_teacher(process):
    """It learns their marginals, exactly; that is all that tokens drawn side by side can have of them."""
    two = chain.written(process, 2, chain.wrong_denoiser)
    one = marginals(chain.written(process, 1, chain.wrong_denoiser))
    _, student = learned(process, Tabled(process, 2), teacher_steps=2, start=np.log(one))
    np.testing.assert_allclose(student, marginals(two), atol=4 * 0.5 / np.sqrt(ROWS))
    assert divergence(two, side_by_side(student)) < divergence(two, side_by_side(one)) - 3e-4


def test_of_a_flow_the_student_learns_where_each_noise_ends():
    """The teacher's passes along the ODE leave nothing open, so that what is said costs all that single tokens hold."""
    alone = marginals(truth())
    hold = -(alone * np.log(alone)).sum()
    costs = [learned(GAUSSIAN, Seer(), teacher_steps=n, start=np.log(alone), rows=4_000) for n in (2, 6)]
    assert costs[0][0] < 0.7 * hold < 0.93 * hold < costs[1][0] < 1.05 * hold
    np.testing.assert_allclose(costs[1][1], alone, atol=0.07)


def test_blocks_are_asked_behind_clean_text():
    seen = []

    def teacher(tokens, t, *, attention, **where):
        seen.append((tokens.shape, t.shape, attention.block_size))
        said = DenseLogits(values=jnp.zeros((2, LENGTH, VOCAB)))
        return said, said

    objective = Distillation(objective=BlockELBO(block_size=2), teacher="t")
    ask = lambda: objective(teacher, Absorbing(mask=MASK), jax.random.key(0), batch_of(TEXTS[:2]), teacher=teacher)  # noqa: E731
    assert jax.jit(ask)()["canvas"].sum == 0
    assert seen == [((2, 8), (2, 2), 2)] * 3 and objective.layout.prefix.block_size == 2


@pytest.mark.parametrize("process", [Absorbing(mask=300), Uniform(mask=300)], ids=["masks", "uniform"])
def test_no_array_of_all_logits_exists(monkeypatch, process):
    """Neither the teacher's nor the student's, with the teacher's steps and the gradient."""
    monkeypatch.setattr(readout_module, "_CHUNK_ROWS", 16)
    module = module_of(DenoiserSpec(width=8, layers=1, heads=1, mlp_dim=8), 300, Execution())
    params = nn.meta.unbox(jax.eval_shape(functools.partial(init_params, module), jax.random.key(0)))
    batch = batch_of(np.zeros((2, 64), np.int32))

    def loss(params, teacher):
        student, teacher = (BoundModel(module=module, params=p).denoise for p in (params, teacher))
        objective = Distillation(teacher="t")
        return objective(student, process, jax.random.key(0), batch, teacher=teacher)["canvas"].sum

    text = str(jax.make_jaxpr(jax.grad(loss))(params, params))
    assert "f32[1,16,384]" in text
    assert not [shape for shape in ("[2,64,384]", "[2,64,300]", "[2,64,301]") if shape in text]


@dataclasses.dataclass(frozen=True)
class Plain(Objective):
    """Some objective."""

    layout, trains_ar = WholeRow(), False

    def __call__(self, *asked):
        return "plain", asked


class Bounded(Plain):
    def elbo(self, *asked):
        return "elbo", asked


@pytest.mark.parametrize(("objective", "kind"), [(Plain(), "plain"), (Bounded(), "elbo")])
def test_the_elbo_is_that_of_the_teachers_objective(objective, kind):
    assert Distillation(objective=objective).elbo(1, 2, 3, 4) == (kind, (1, 2, 3, 4))


@pytest.mark.parametrize("bad", [{"student_steps": 0}, {"teacher_steps": 1}, {"objective": AutoregressiveLoss()}])
def test_what_can_not_be_is_refused_in_a_line(bad):
    with pytest.raises(ValueError) as error:
        Distillation(**bad)
    assert "\n" not in str(error.value)


def test_a_student_without_its_teacher_says_so():
    with pytest.raises(ValueError, match="needs its teacher"):
        Distillation()(Seer(), Absorbing(mask=MASK), jax.random.key(0), batch_of(TEXTS))
