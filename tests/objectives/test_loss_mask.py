"""What is noised and scored: all of a document but what is given; what is counted: its targets."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.all_noise import AllNoise
from support.small import module_of

from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import init_params
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.types import Alignment, Batch, DenseLogits, Loss

VOCAB = MASK = 7
EOS = 2
OBJECTIVES = [
    AutoregressiveLoss(),
    ELBO(),
    BlockELBO(block_size=4),
    BlockELBO(block_size=4, clean="causal"),
    Joint(block_size=4),
]
PROCESS = Absorbing(mask=MASK)


def packed(seed=0, rows=2) -> Batch:
    """Two documents a row: begin of text, words, end of text; the second ends two positions early and repeats it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, size=(rows, 16))
    tokens[:, [0, 8]], tokens[:, [7, 13]], tokens[:, 14:] = 1, EOS, EOS
    at = np.arange(16)
    given = np.broadcast_to((at % 8) == 0, tokens.shape)
    target = np.broadcast_to(~given & (at < 14), tokens.shape)
    arrays = tokens, np.broadcast_to(1 + at // 8, tokens.shape), np.broadcast_to(at % 8, tokens.shape)
    return Batch(
        *(jnp.asarray(a, jnp.int32) for a in arrays), context_mask=jnp.asarray(given), loss_mask=jnp.asarray(target)
    )


@functools.cache
def network() -> BoundModel:
    module = module_of(DenoiserSpec(width=8, layers=1, heads=2, mlp_dim=8), VOCAB)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, module))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return BoundModel(
        module=module, params=jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype("f4"), params)
    )


@functools.partial(jax.jit, static_argnums=0)
def _cost(objective, bound, key, batch):
    return objective(bound.denoise, PROCESS, key, batch)


def cost(objective, batch) -> dict[str, Loss]:
    """What a small random network costs by the objective, with one and the same noise each time."""
    return _cost(objective, network(), jax.random.key(0), batch)


def test_given_stays_and_all_else_of_a_document_is_noised_and_scored():
    """A network that finds each token as likely as any other costs log V wherever noise is scored."""
    batch, seen = packed(rows=200), []
    batch = batch.replace(segment_ids=batch.segment_ids.at[0].set(0))  # an empty row

    def denoise(tokens, t, **inputs):
        noisy, _ = jnp.split(tokens, 2, axis=1)
        seen.append(noisy)
        return DenseLogits(values=jnp.zeros((*noisy.shape, VOCAB))), None

    objective = BlockELBO(block_size=16, num_timesteps=2)
    loss = objective(denoise, _OneStep(mask=MASK), jax.random.key(0), batch)["canvas"]
    (xt,) = seen
    masked = (xt == MASK) & (batch.segment_ids > 0)
    assert (xt == batch.tokens)[batch.context_mask].all()
    for part in (batch.loss_mask, ~batch.loss_mask & ~batch.context_mask):  # targets, and the end of text repeated
        assert abs(masked[1:][part[1:]].mean() - 0.75) < 0.1
    np.testing.assert_allclose(loss.sum, masked.sum() * np.log(VOCAB), rtol=1e-5)


class _OneStep(Absorbing):
    def step_weight(self, t, s):
        return jnp.full_like(t, 0.5)  # times 2 steps: each mask counts once


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_weight_counts_targets(objective):
    batch = packed()
    for loss in cost(objective, batch).values():
        assert loss.weight == batch.loss_mask.sum() == 24


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_rows_without_text_cost_nothing(objective):
    batch, no = packed(), jnp.zeros((2, 16), bool)
    batch = batch.replace(loss_mask=no, context_mask=no, segment_ids=jnp.zeros_like(batch.segment_ids))
    for loss in cost(objective, batch).values():
        assert loss.sum == 0 and loss.weight == 0


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if not isinstance(o, ELBO)], ids=str)
def test_documents_do_not_influence_each_other(objective):
    """Another first document (or second): what the other one costs stays."""
    batch, other = packed(), packed(seed=9)

    def sums(tokens, document):
        one = batch.replace(tokens=tokens, loss_mask=batch.loss_mask & (batch.segment_ids == document))
        one = one.replace(context_mask=~one.loss_mask)
        return np.array([loss.sum for loss in cost(objective, one).values()])

    for changed in (1, 2):
        tokens = jnp.where(batch.segment_ids == changed, other.tokens, batch.tokens)
        np.testing.assert_allclose(sums(tokens, 3 - changed), sums(batch.tokens, 3 - changed), rtol=1e-6)
        assert (abs(sums(tokens, changed) - sums(batch.tokens, changed)) > 1e-3).all()


def test_the_causal_part_adds_up_over_rows():
    batch = packed()
    one, two = (
        cost(AutoregressiveLoss(), jax.tree.map(lambda a, i=i: a[i : i + 1], batch))["causal"] for i in range(2)
    )
    whole, both = cost(AutoregressiveLoss(), batch)["causal"], one + two
    np.testing.assert_allclose(both.sum, whole.sum, rtol=1e-6)
    assert both.weight == whole.weight


def test_pure_noise_holds_what_is_given_and_masks():
    batch, seen = packed(), []
    everything = Absorbing(mask=MASK, schedule=AllNoise())

    def said(tokens, t, **kwargs):
        seen.append(tokens)
        return DenseLogits(values=jnp.zeros((*tokens.shape, VOCAB)))

    ELBO()(said, everything, jax.random.key(0), batch)
    assert (seen[0][:, 0] == batch.tokens[:, 0]).all()  # a row's first token is given,
    assert (seen[0][:, 1:] == MASK).all()  # where its second document begins is not


@pytest.mark.parametrize("objective", [BlockELBO(block_size=4), Joint(block_size=4)], ids=str)
def test_one_pass_reads_noise_and_clean_text_at_their_times(objective):
    batch, seen = packed(), []

    def said(tokens, t, *, attention, positions, segment_ids):
        seen.append((tokens, t))
        zeros = jnp.zeros((*batch.tokens.shape, VOCAB))
        return DenseLogits(values=zeros), DenseLogits(values=zeros, alignment=Alignment.NEXT)

    objective(said, PROCESS, jax.random.key(0), batch)
    ((tokens, t),) = seen
    assert (tokens[:, 16:] == batch.tokens).all() and tokens.shape == (2, 32)
    assert t.shape == (2, 8) and (t[:, 4:] == 0).all() and (t[:, :4] > 0).all()
    assert len(np.unique(t[:, :4])) == 8  # a time of its own for every block


def test_a_loss_of_nothing_has_mean_zero():
    assert Loss(sum=jnp.zeros(()), weight=jnp.zeros(())).mean == 0
