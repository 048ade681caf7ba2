"""A bigram model of numbered tokens: all that the loop's tests need of a network and of a loader."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.training.checkpoint import CheckpointMeta
from diffusion_lm.training.loop import Train, TrainLoop
from diffusion_lm.training.optimizer import AdamW, WarmupCosine
from diffusion_lm.training.state import initial, unboxed
from diffusion_lm.training.step import make_step, make_steps
from diffusion_lm.types import Batch, Loss

VOCAB, LENGTH = 11, 8
QUICK = {"xla_backend_optimization_level": 0}  # compiles in a third of the time
META = CheckpointMeta(config={"name": "toy"}, tokenizer={"base64": "AP8="}, corpus="abc")
OPTIM = AdamW(lr=1e-2, schedule=WarmupCosine(warmup=3))


def init(key):
    """Parameters boxed with logical axes: a table and a vector."""
    a, b = jax.random.split(key)
    table = 0.1 * jax.random.normal(a, (VOCAB, VOCAB))
    bias = 0.1 * jax.random.normal(b, (VOCAB,))
    return {
        "table": nn.LogicallyPartitioned(table, names=("vocab", None)),
        "bias": nn.LogicallyPartitioned(bias, names=("vocab",)),
    }


def loss(params, key, batch, constants=(), noise=0.0):
    """Next-token cross-entropy; `noise` shakes the logits, to have a loss that draws."""
    logits = params["table"][batch.tokens[:, :-1]] + params["bias"][None, None, :]
    logits = logits + noise * jax.random.normal(key, logits.shape)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], axis=-1)[..., 0]
    scored = batch.loss_mask[:, 1:]
    total, weight = -jnp.sum(jnp.where(scored, log_p, 0.0)), jnp.sum(scored, dtype=jnp.float32)
    return {"next": Loss(sum=total, weight=weight)}


def batch_at(index, rows=4):
    """Batch number `index`: numbers that count up from anywhere, with some positions unscored."""
    rng = np.random.default_rng([7, index])
    tokens = (rng.integers(VOCAB, size=(rows, 1)) + np.arange(LENGTH)) % VOCAB
    target = (rng.random((rows, LENGTH)) < 0.7) & (np.arange(LENGTH) > 0)
    ones = np.ones((rows, LENGTH), np.int32)
    positions = ones * np.arange(LENGTH, dtype=np.int32)
    return Batch(
        tokens=tokens.astype(np.int32), segment_ids=ones, positions=positions, context_mask=~target, loss_mask=target
    )


def stacked(index, rows=4):
    """Batch number `index` as a call of one step takes it."""
    return jax.tree.map(lambda x: jnp.asarray(x)[None], batch_at(index, rows))


class Loader:
    """Counts batches."""

    def __init__(self, rows=4):
        self.rows, self.next = rows, 0

    def __next__(self):
        self.next += 1
        return batch_at(self.next - 1, self.rows)

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def job(train: Train, loss=loss, loader=None, constants=()):
    """A whole job on one device; what is compiled is shared."""
    made, held_out = _job(train, loss)
    return dataclasses.replace(
        made,
        batches=loader or Loader(train.batch_size),
        constants=constants,
        evaluate=lambda params: {"valid/next": float(held_out(params, constants))},
    )


@functools.cache
def _job(train, loss):
    boxed = jax.eval_shape(init, jax.random.key(0))
    optimizer = OPTIM.build(train.steps, boxed)
    step = make_step(
        loss, optimizer, OPTIM.rate(train.steps), grad_accum_steps=train.grad_accum_steps, ema=train.ema_decay
    )

    def fresh():
        return unboxed(initial(init, optimizer, train.ema_decay > 0, jax.random.key(1)))

    def held_out(params, constants):
        return loss(params, jax.random.key(3), batch_at(10**6), constants)["next"].mean

    made = TrainLoop(
        initial=jax.jit(fresh, compiler_options=QUICK),
        abstract=jax.eval_shape(fresh),
        step=jax.jit(make_steps(step), donate_argnums=0, compiler_options=QUICK),
        batches=None,
        put=lambda batch: jax.tree.map(jnp.asarray, batch),
        evaluate=None,
        key=jax.random.key(2),
        meta=META,
    )
    return made, jax.jit(held_out, compiler_options=QUICK)
