"""The update of a run, jitted and laid out on a mesh."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from diffusion_lm import sharding
from diffusion_lm.training import state as train_state
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import Optimizer
from diffusion_lm.training.state import TrainState
from diffusion_lm.training.step import LossFn, Stages, Step, make_step, make_steps
from diffusion_lm.types import Array

Constants = Mapping[str, Any]  # frozen networks and arrays by name: see `step.LossFn`
InitFn = Callable[[Array, Constants], Any]  # key and constants -> parameters, boxed with their logical axes


class CompiledUpdate(NamedTuple):
    """A run's jitted functions on a mesh; nothing has run yet.

    initial   (key, constants) -> the state before the first step
    abstract  the state's shapes and shardings
    step      (state, key, batches [S, B, L], constants) -> state, metrics [S]; donates the state
    """

    initial: Callable[[Array, Constants], TrainState]
    abstract: TrainState
    step: Step


def build_update(
    train: Train, optim: Optimizer, mesh: Mesh, loss: LossFn | Stages, init: InitFn, constants: Constants
) -> CompiledUpdate:
    """Makes the update and its state's layout. Runs nothing, so the mesh's devices need not exist.

    Args:
        train: steps, accumulation and averaging.
        optim: the optimizer.
        mesh: where state and batches lie.
        loss: the training loss.
        init: makes the parameters.
        constants: what init and loss get; may be abstract, with the shardings that they will have.
    """
    key, rate = jax.random.key(0), optim.rate(train.steps)
    optimizer = optim.build(train.steps, jax.eval_shape(init, key, constants))

    def initial(key: Array, constants: Constants) -> TrainState:
        return train_state.initial(lambda key: init(key, constants), optimizer, train.ema_decay > 0, key)

    step = make_step(loss, optimizer, rate, grad_accum_steps=train.grad_accum_steps, ema=train.ema_decay)
    boxed = jax.eval_shape(initial, key, constants)
    shardings, whole = sharding.state_shardings(mesh, boxed), sharding.replicated(mesh)
    first = sharding.on(mesh, lambda key, constants: train_state.unboxed(initial(key, constants)))
    return CompiledUpdate(
        initial=jax.jit(first, out_shardings=shardings),
        abstract=sharding.placed(train_state.unboxed(boxed), shardings),
        step=jax.jit(sharding.on(mesh, make_steps(step)), donate_argnums=0, out_shardings=(shardings, whole)),
    )
