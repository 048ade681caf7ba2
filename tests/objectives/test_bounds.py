"""Every bound, by enumeration: all texts, all masks, quadrature over time, through the public objectives.

A loss is linear in its weights and a block's part depends on its own mask only. So a process with a given
pattern of masks at a given time, which multiplies the true process's weight by the pattern's probability, makes one
batch of all cases sum up to the exact expectation.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from support.oracle import (
    LENGTH,
    MASK,
    TEXTS,
    VOCAB,
    Oracle,
    batch_of,
    conditionals,
    entropy,
    log_mean_exp,
    log_p_in_order,
    orders,
    truth,
    wrong_conditionals,
)

from diffusion_lm.attention_patterns import Causal, Full
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.schedules import Cosine, Geometric, Linear, Polynomial

SCHEDULES = [Linear(), Cosine(), Polynomial(power=2.0), Polynomial(power=0.5), Geometric()]


SOME = Absorbing(schedule=Cosine(), mask=MASK)


@pytest.fixture(params=SCHEDULES, ids=str)
def process(request):
    return Absorbing(schedule=request.param, mask=MASK)


@struct.dataclass
class Enumerated:
    """A process whose noise, times and weights are given: pattern bool [B, K], times float32 [B, 1], share [B, 1]."""

    process: Absorbing = struct.field(pytree_node=False)
    pattern: jax.Array
    times: jax.Array
    share: jax.Array

    def prior(self, key, shape):
        return self.process.prior(key, shape)

    def corrupt(self, key, x0, t):
        return jnp.where(jnp.tile(self.pattern, (1, x0.shape[1] // self.pattern.shape[1])), MASK, x0)

    def nelbo(self, head, x0, xt, t, weights, num_timesteps):
        alpha = self.process.schedule.alpha(self.times)
        p = jnp.prod(jnp.where(self.pattern, 1 - alpha, alpha), axis=1, keepdims=True)
        times = jnp.broadcast_to(self.times, t.shape)
        cases = jnp.where(p > 0, p * self.share, 0.0)
        return self.process.nelbo(head, x0, xt, times, weights * cases, num_timesteps)


def times_and_shares(num_timesteps):
    """All T times, or 32 nodes of Gauss-Legendre in the root of t, in which every schedule here is smooth."""
    if num_timesteps:
        return np.arange(1, num_timesteps + 1) / num_timesteps, np.full(num_timesteps, 1 / num_timesteps)
    node, weight = np.polynomial.legendre.leggauss(32)
    root = (node + 1) / 2
    return root**2, root * weight


@functools.partial(jax.jit, static_argnums=(0, 1))
def cost(objective, rule, process, key, batch):
    return objective(Oracle(rule), process, key, batch)


def expectation(objective, process, *, context_mask=0, rule=conditionals, p=None):
    """E over texts, masks and times of each of the objective's parts, in nats a text."""
    width = objective.layout.canvas_length(LENGTH)
    times, shares = times_and_shares(objective.num_timesteps)
    patterns = np.array(list(itertools.product([False, True], repeat=width)))
    text, pattern, time = (a.reshape(-1) for a in np.mgrid[: len(TEXTS), : len(patterns), : len(times)])
    p = truth() if p is None else p
    enumerated = Enumerated(
        process=process,
        pattern=jnp.asarray(patterns[pattern]),
        times=jnp.asarray(times[time], jnp.float32)[:, None],
        share=jnp.asarray(p[text] * shares[time], jnp.float32)[:, None],
    )

    batch = batch_of(TEXTS[text], context_mask)
    return {name: float(loss.sum) for name, loss in cost(objective, rule, enumerated, jax.random.key(0), batch).items()}


def next_token_nats(rule=conditionals) -> np.ndarray:
    """[81]: what the autoregressive objective says each text costs, its first token given."""

    def nats(text):
        return AutoregressiveLoss()(Oracle(rule), None, None, batch_of(text[None], 1))["causal"].sum

    return np.asarray(jax.jit(jax.vmap(nats))(jnp.asarray(TEXTS)))


def test_masked_bound_of_the_truth_is_the_entropy(process):
    assert abs(expectation(ELBO(), process)["canvas"] - entropy()) < 1e-4


def test_given_tokens_are_conditioned_on():
    assert abs(expectation(ELBO(), SOME, context_mask=2)["canvas"] - entropy(given=2)) < 1e-4


@pytest.mark.parametrize(("block", "clean"), [(1, "block"), (2, "block"), (2, "causal"), (4, "block")])
def test_block_bound_of_the_truth_is_the_entropy(process, block, clean):
    assert abs(expectation(BlockELBO(block_size=block, clean=clean), process)["canvas"] - entropy()) < 1e-4


def test_steps_fall_towards_continuous_time(process):
    bounds = [expectation(ELBO(num_timesteps=num_timesteps), process)["canvas"] for num_timesteps in (1, 2, 4, 16)]
    assert (np.diff(bounds) < 0).all() and bounds[-1] > entropy()
    assert bounds[-1] - entropy() < 0.35 * (bounds[1] - entropy())


def test_one_step_costs_the_sum_of_marginal_entropies():
    table = truth().reshape((VOCAB,) * LENGTH)
    marginals = [table.sum(axis=tuple(j for j in range(LENGTH) if j != i)) for i in range(LENGTH)]
    cost = -sum((p * np.log(p)).sum() for p in marginals)
    assert abs(expectation(ELBO(num_timesteps=1), SOME)["canvas"] - cost) < 1e-4


def test_block_bound_lies_between_its_ends():
    """A block of 2 in one step: dearer than token by token, cheaper than all at once."""
    process = Absorbing(schedule=Linear(), mask=MASK)
    one, two, four = (
        expectation(BlockELBO(block_size=block, num_timesteps=1), process)["canvas"] for block in (1, 2, 4)
    )
    assert abs(one - entropy()) < 1e-4 and one + 0.01 < two and two + 0.01 < four


def test_autoregression_costs_the_conditional_entropy():
    assert abs(truth() @ next_token_nats() - entropy(given=1)) < 1e-5


@pytest.mark.parametrize("rule", [conditionals, wrong_conditionals])
def test_block_of_one_is_autoregression(rule):
    """For any denoiser and for single texts, not only in the mean over the true ones."""
    for row in (0, 17):
        bound = expectation(BlockELBO(block_size=1), SOME, context_mask=1, rule=rule, p=np.eye(len(TEXTS))[row])[
            "canvas"
        ]
        assert abs(bound - next_token_nats(rule)[row]) < 1e-4


def test_block_as_wide_as_the_row_is_the_masked_bound():
    block, masked = (expectation(o, SOME, rule=wrong_conditionals) for o in (BlockELBO(block_size=4), ELBO()))
    assert abs(block["canvas"] - masked["canvas"]) < 1e-5


def test_joint_is_the_sum_of_its_parts():
    """Key by key and bit by bit of noise, not only in the mean."""
    batch = batch_of(TEXTS, context_mask=1)

    def parts(objective):
        return jax.jit(lambda key: objective(Oracle(wrong_conditionals), SOME, key, batch))(jax.random.key(3))

    joint, causal = parts(Joint(block_size=2)), parts(AutoregressiveLoss())["causal"]
    canvas = parts(BlockELBO(block_size=2, clean="causal"))["canvas"]
    assert set(joint) == {"causal", "canvas"}
    np.testing.assert_allclose([joint["causal"].sum, joint["canvas"].sum], [causal.sum, canvas.sum], rtol=1e-6)
    assert joint["causal"].weight == joint["canvas"].weight == causal.weight == canvas.weight == 81 * 3
    weighted = Joint(block_size=2, canvas_weight=0.3)
    np.testing.assert_allclose(parts(weighted)["canvas"].sum, 0.3 * canvas.sum, rtol=1e-6)
    bound = jax.jit(lambda key: weighted.elbo(Oracle(wrong_conditionals), SOME, key, batch))(jax.random.key(3))
    np.testing.assert_allclose(bound["canvas"].sum, canvas.sum, rtol=1e-6)  # what is reported is a bound


class WrongWeight(Absorbing):
    """1/t under every schedule, as a public library has it."""

    def rate_weight(self, t):
        return 1 / t


def test_a_wrong_weight_is_noticed():
    assert abs(expectation(ELBO(), WrongWeight(schedule=Linear(), mask=MASK))["canvas"] - entropy()) < 1e-4
    for schedule in (Cosine(), Geometric()):
        assert abs(expectation(ELBO(), WrongWeight(schedule=schedule, mask=MASK))["canvas"] - entropy()) > 0.1


def test_another_denoisers_bound_is_the_mean_over_orders_and_above_what_its_sampler_writes():
    """In continuous time positions are revealed one by one in random order: bound = mean of logs, nll = log of mean."""
    by_order = np.stack([log_p_in_order(wrong_conditionals, order) for order in orders()])
    bound = expectation(ELBO(), SOME, rule=wrong_conditionals)["canvas"]
    assert abs(bound + truth() @ by_order.mean(axis=0)) < 1e-4
    nll = -(truth() @ log_mean_exp(by_order, axis=0))
    assert bound > nll + 0.01 > entropy() + 0.02


FIXED = Absorbing(schedule=Cosine(), fixed_count=True, mask=MASK)


@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize(
    ("objective", "process"),
    [
        (ELBO(), SOME),
        (ELBO(num_timesteps=3), SOME),
        (BlockELBO(block_size=2), SOME),
        (ELBO(), FIXED),
        (BlockELBO(block_size=2), FIXED),
    ],
    ids=str,
)
def test_drawn_noise_and_times_have_the_same_mean(objective, process, context):
    """The objective as it is used, 4,000 rows of texts drawn from the world, within 4 standard errors. A wrong network,
    since the right one costs the same in every order."""
    texts = TEXTS[np.random.default_rng(0).choice(len(TEXTS), size=200, p=truth())]
    batch = batch_of(texts, context)
    sums = jax.jit(jax.vmap(lambda key: objective(Oracle(wrong_conditionals), process, key, batch)["canvas"].sum))(
        jax.random.split(jax.random.key(1), 100)
    )
    share = np.bincount(texts @ np.array([27, 9, 3, 1]), minlength=81) / len(texts)
    exact = expectation(objective, SOME, context_mask=context, rule=wrong_conditionals, p=share)["canvas"] * len(texts)
    assert abs(sums.mean() - exact) < 4 * sums.std() / math.sqrt(len(sums))


def test_fixed_counts_vary_less():
    """And with an eighth of the noise's variance at this size: no weight passes the canvas's length."""
    batch = batch_of(TEXTS)

    def deviation(process):
        keys = jax.random.split(jax.random.key(1), 100)
        return jax.jit(jax.vmap(lambda key: ELBO()(Oracle(), process, key, batch)["canvas"].sum))(keys).std()

    assert deviation(FIXED) < 0.5 * deviation(SOME)


def test_fixed_counts_are_of_continuous_time():
    with pytest.raises(ValueError, match=r"process\.fixed_count"):
        ELBO(num_timesteps=4)(Oracle(), FIXED, jax.random.key(0), batch_of(TEXTS[:2]))


@pytest.mark.parametrize("bad", [{"block_size": 0}, {"block_size": -4}, {"num_timesteps": -1}])
@pytest.mark.parametrize("kind", [BlockELBO, Joint])
def test_what_can_not_be_is_refused(kind, bad):
    with pytest.raises(ValueError, match="objective"):
        kind(**bad)


def test_steps_below_zero_are_refused():
    with pytest.raises(ValueError, match=r"objective\.num_timesteps"):
        ELBO(num_timesteps=-1)


def test_a_block_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match="do not divide"):
        BlockELBO(block_size=3)(Oracle(), Absorbing(mask=MASK), jax.random.key(0), batch_of(TEXTS[:2]))


def test_logits_that_speak_of_the_wrong_token_are_refused():
    def always(attention):
        return lambda tokens, t, **rest: Oracle()(tokens, t, **{**rest, "attention": attention})

    batch, process = batch_of(TEXTS[:2], 1), Absorbing(mask=MASK)
    with pytest.raises(ValueError, match="next token"):
        AutoregressiveLoss()(always(Full()), process, jax.random.key(0), batch)
    with pytest.raises(ValueError, match="same position"):
        ELBO()(always(Causal()), process, jax.random.key(0), batch)
