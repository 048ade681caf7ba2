"""One update: the gradient over micro-batches, the optimizer, the moving average of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from diffusion_lm.training.state import TrainState
from diffusion_lm.types import Array, Batch, Loss


class LossFn(Protocol):
    """The loss of a network as a function of its parameters."""

    def __call__(self, params: Any, key: Array, batch: Batch, constants: Any) -> dict[str, Loss]:
        """The parts of the loss by name, with one common weight: the number of targets.

        Args:
            params: what is trained; a gradient is taken for each array.
            key: a random key.
            batch: rows [B, L].
            constants: frozen networks and arrays, any pytree. They are arguments of the jitted update with their own
                shardings, and have neither a gradient nor an optimizer state.
        """


class Stages(NamedTuple):
    """Losses that train in turn over a run, with the same parts.

    ends    the updates after which each but the last one ends, ascending
    losses  one more than ends
    """

    ends: tuple[int, ...]
    losses: tuple[LossFn, ...]


def stages_of(loss: LossFn | Stages) -> Stages:
    """A single loss is one stage."""
    return loss if isinstance(loss, Stages) else Stages((), (loss,))


Step = Callable[[TrainState, Array, Batch, Any], tuple[TrainState, dict[str, Array]]]


def make_step(
    loss: LossFn | Stages,
    optimizer: optax.GradientTransformation,
    rate: Callable[[Array], Array],
    *,
    grad_accum_steps: int = 1,
    ema: float = 0.0,
) -> Step:
    """Makes step(state, key, batch [B, L], constants) -> (next state, metrics).

    Accumulation only saves memory: sums and weights are added over the parts and divided once. The step's key is
    fold_in(key, state.step), so a resumed run continues with the same random numbers.

    Args:
        loss: the loss, or several in turn.
        optimizer: updates the parameters.
        rate: step -> learning rate, for the metrics.
        grad_accum_steps: equal parts in which the B rows are processed.
        ema: decay of the moving average of the parameters, if the state has one.

    Returns:
        The step. Its metrics are float32 []: loss and loss/PART in nats per target, aux_loss (if any), targets,
        grad_norm (before clipping), lr, finite (0 or 1).
    """

    stages = stages_of(loss)

    def step(state: TrainState, key: Array, batch: Batch, constants: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        stage = jnp.sum(state.step >= jnp.asarray(stages.ends, jnp.int32))
        grads, losses = _gradients(stages.losses, stage, state.params, key, batch, constants, grad_accum_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, average = optax.apply_updates(state.params, updates), state.ema_params
        if average is not None:
            average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, average, params)
        following = TrainState(step=state.step + 1, params=params, ema_params=average, opt_state=opt_state)
        return following, _metrics(losses, optax.tree.norm(grads), rate(state.step))

    return step


def make_steps(step: Step) -> Step:
    """steps(state, key, batches [S, B, L], constants): S updates in one call of the device; metrics [S]."""

    def steps(state: TrainState, key: Array, batches: Batch, constants: Any):
        return jax.lax.scan(lambda carry, batch: step(carry, key, batch, constants), state, batches)

    return steps


def _gradients(
    losses: tuple[LossFn, ...], stage: Array, params: Any, key: Array, batch: Batch, constants: Any, parts: int
):
    """Gradients of the stage's whole loss per target, and the losses by name."""

    def differentiated(loss: LossFn):
        def total(params, key, rows):
            losses = loss(params, key, rows, constants)
            return sum(part.sum + (0.0 if part.aux_loss is None else part.aux_loss) for part in losses.values()), losses

        return jax.value_and_grad(total, has_aux=True)

    def micro(key, rows):
        # the gradient is within the choice: that of a choice would keep what each stage's backward pass needs
        (_, found), grads = jax.lax.switch(stage, [differentiated(loss) for loss in losses], params, key, rows)
        return grads, found

    grads, found = micro(key, batch) if parts == 1 else _accumulate(micro, key, batch, parts)
    weight = jnp.maximum(next(iter(found.values())).weight, 1.0)
    return jax.tree.map(lambda g: g / weight, grads), found


def _accumulate(micro: Callable, key: Array, batch: Batch, parts: int) -> Any:
    """The sum of micro(own key, rows) over equal parts of the rows, each with rows from every device."""
    batches = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, xs):
        return jax.tree.map(jnp.add, total, micro(*xs)), None

    shapes = jax.eval_shape(micro, key, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (jax.random.split(key, parts), batches))[0]


def _metrics(losses: dict[str, Loss], grad_norm: Array, lr: Array) -> dict[str, Array]:
    parts = {f"loss/{name}": part.mean for name, part in losses.items()}
    value = sum(parts.values())
    aux = [part.aux_loss / jnp.maximum(part.weight, 1.0) for part in losses.values() if part.aux_loss is not None]
    return {
        "loss": value,
        **parts,
        **({"aux_loss": sum(aux)} if aux else {}),
        "targets": next(iter(losses.values())).weight,
        "grad_norm": grad_norm,
        "lr": lr,
        "finite": (jnp.isfinite(value) & jnp.isfinite(grad_norm)).astype(jnp.float32),
    }
