"""Rows of prompts and answers under every objective: prompts are never noised or scored, records never meet."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.all_noise import AllNoise
from support.small import MASK, SPECS, VOCAB, bound

from diffusion_lm.data.packing import Example, groups, pack, place
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.types import DenseLogits

LENGTH, EOS = 24, 2
OBJECTIVES = [AutoregressiveLoss(), ELBO(), BlockELBO(block_size=4), BlockELBO(block_size=4, clean="causal"),
              Joint(block_size=4)]  # fmt: skip
TOKENIZER = types.SimpleNamespace(mask=MASK, eos=EOS, stops=(EOS,))


NOISE = Absorbing(mask=MASK, schedule=AllNoise())


def example(rng, prompt, answer):
    tokens = np.append(rng.integers(3, VOCAB, size=prompt + answer), EOS).astype(np.int32)
    return Example(tokens, np.arange(prompt + answer + 1) >= prompt)


def examples():
    rng = np.random.default_rng(0)
    return [example(rng, prompt, answer) for prompt, answer in ((3, 2), (2, 5), (5, 4), (1, 1))]


def batch_of(objective, found, packed=True):
    """Rows [4, LENGTH]; the last are empty where examples share rows."""
    layout = objective.layout
    sizes = [place(one, layout, LENGTH, (EOS,)).end for one in found]
    rows = [[found[i] for i in row] for row in groups(sizes, layout, LENGTH)] if packed else [[one] for one in found]
    rows += [[]] * (4 - len(rows))
    return jax.tree.map(jnp.asarray, pack(layout, rows, LENGTH, TOKENIZER))


@jax.jit(static_argnums=0)
def _sums(objective, network, batch):
    return objective(network.denoise, NOISE, jax.random.key(0), batch)


def sums(objective, batch):
    """The parts' sums and weights."""
    losses = _sums(objective, bound(SPECS["plain"]), batch).values()
    return np.array([[loss.sum, loss.weight] for loss in losses])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_packed_costs_what_each_alone_costs(objective):
    packed = batch_of(objective, examples())
    alone = batch_of(objective, examples(), packed=False)
    assert packed.segment_ids.max() > 1 or isinstance(objective, ELBO)
    np.testing.assert_allclose(sums(objective, packed), sums(objective, alone), rtol=2e-6)
    assert (sums(objective, packed)[:, 1] == sum(int(e.targets.sum()) for e in examples())).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_change_moves_no_other_records_loss(objective):
    """Whether of a prompt's token or of an answer's; its own loss moves."""
    found = examples()
    for changed, position in ((0, 0), (1, 3)):
        other = list(found)
        tokens = found[changed].tokens.copy()
        tokens[position] = 3 + (tokens[position] - 2) % (VOCAB - 3)
        other[changed] = Example(tokens, found[changed].targets)
        before, after = batch_of(objective, found), batch_of(objective, other)
        (where,) = np.argwhere(np.asarray(before.tokens != after.tokens))
        mine = before.segment_ids == before.segment_ids[tuple(where)]
        mine &= (jnp.arange(4) == where[0])[:, None]

        def only(batch, here):
            """The batch in which nothing else is learned."""
            unlearned = (batch.segment_ids > 0) & ~here
            return batch.replace(loss_mask=batch.loss_mask & here, context_mask=batch.context_mask | unlearned)

        rest = [sums(objective, only(batch, ~mine)) for batch in (before, after)]
        np.testing.assert_allclose(*rest, rtol=1e-6)
        own = [sums(objective, only(batch, mine)) for batch in (before, after)]
        assert (abs(own[0] - own[1])[:, 0] > 1e-4).all()


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.layout.denoises], ids=str)
def test_prompts_are_never_noised(objective):
    batch, seen = batch_of(objective, examples()), []

    def denoise(tokens, t, *, attention, positions, segment_ids):
        seen.append(attention.split(tokens)[0])
        heads = [DenseLogits(values=jnp.zeros((*batch.tokens.shape, VOCAB)), alignment=a) for a in attention.alignments]
        return heads[0] if len(heads) == 1 else tuple(heads)

    objective(denoise, NOISE, jax.random.key(0), batch)
    (noisy,) = seen
    text = batch.segment_ids > 0
    assert (noisy == batch.tokens)[batch.context_mask].all()
    assert (noisy == MASK)[text & ~batch.context_mask].all() and (text & ~batch.context_mask & ~batch.loss_mask).any()


def test_a_prompt_has_no_loss():
    """Logits that find every token of a prompt impossible cost nothing there."""
    batch = batch_of(AutoregressiveLoss(), examples())
    following = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
    scored = jnp.pad(batch.loss_mask[:, 1:], ((0, 0), (0, 1)))
    values = jnp.where(scored, 30.0, -30.0)[..., None] * jax.nn.one_hot(following, VOCAB)

    def denoise(tokens, t, *, attention, **_):
        return DenseLogits(values=values, alignment=attention.alignments[0])

    assert AutoregressiveLoss()(denoise, NOISE, jax.random.key(0), batch)["causal"].mean < 1e-6
