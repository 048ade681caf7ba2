"""One update: gradients of a loss's sum over micro-batches, clipped, AdamW, and the running average."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from diffusion_lm.training.state import TrainState
from diffusion_lm.types import Array, Batch, Loss


class LossFn(Protocol):
    """A network and an objective, closed over: parts with one common weight, the targets scored."""

    def __call__(self, params: Any, key: Array, batch: Batch) -> dict[str, Loss]: ...


def make_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    rate: Callable[[Array], Array],
    *,
    grad_accum_steps: int = 1,
    ema: float = 0.0,
) -> Callable[[TrainState, Array, Batch], tuple[TrainState, dict[str, Array]]]:
    """step(state, key, batch [B, L]) -> the next state and float32 [] metrics.

    The B rows go through in `grad_accum_steps` parts, which only changes the memory needed: sums and weights are added and
    divided once. The step's key is fold_in(key, state.step), so a run that resumes draws what it would have drawn.
    Metrics: loss and each part in nats per target, targets, grad_norm (before clipping), lr, finite (0 or 1); and, for
    networks that have one, the penalty that is minimised beside the loss.
    """

    def step(state: TrainState, key: Array, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        grads, losses = _gradients(loss, state.params, jax.random.fold_in(key, state.step), batch, grad_accum_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        following = TrainState(
            step=state.step + 1,
            params=params,
            ema_params=None if state.ema_params is None else _averaged(state.ema_params, params, ema),
            opt_state=opt_state,
        )
        return following, _metrics(losses, optax.tree.norm(grads), rate(state.step))

    return step


def make_steps(step: Callable) -> Callable:
    """steps(state, key, batches [S, B, L]): S updates, metrics [S]: the host's share, paid once."""

    def steps(state: TrainState, key: Array, batches: Batch):
        return jax.lax.scan(lambda carry, batch: step(carry, key, batch), state, batches)

    return steps


def _gradients(loss: LossFn, params: Any, key: Array, batch: Batch, parts: int) -> tuple[Any, dict[str, Loss]]:
    """Gradients of the total loss per target, and the losses by name."""

    def total(params, key, rows):
        losses = loss(params, key, rows)
        return sum(part.sum + (0.0 if part.aux_loss is None else part.aux_loss) for part in losses.values()), losses

    def micro(key, rows):
        (_, losses), grads = jax.value_and_grad(total, has_aux=True)(params, key, rows)
        return grads, losses

    if parts == 1:
        grads, losses = micro(key, batch)
    else:
        grads, losses = _summed(micro, key, _micro_batches(batch, parts), parts)
    weight = jnp.maximum(next(iter(losses.values())).weight, 1.0)
    return jax.tree.map(lambda g: g / weight, grads), losses


def _micro_batches(batch: Batch, parts: int) -> Batch:
    """[B, L] -> [parts, B / parts, L], each part with rows from every device."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _summed(micro: Callable, key: Array, batches: Batch, parts: int) -> Any:
    """The sum of micro(its own key, rows) over the leading axis."""

    def add(total, xs):
        return jax.tree.map(jnp.add, total, micro(*xs)), None

    shapes = jax.eval_shape(micro, key, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (jax.random.split(key, parts), batches))[0]


def _averaged(average: Any, params: Any, decay: float) -> Any:
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def _metrics(losses: dict[str, Loss], grad_norm: Array, lr: Array) -> dict[str, Array]:
    parts = {f"loss/{name}": part.mean for name, part in losses.items()}
    value = sum(parts.values())
    aux_losses = [
        part.aux_loss / jnp.maximum(part.weight, 1.0) for part in losses.values() if part.aux_loss is not None
    ]
    return {
        "loss": value,
        **parts,
        **({"penalty": sum(aux_losses)} if aux_losses else {}),
        "targets": next(iter(losses.values())).weight,
        "grad_norm": grad_norm,
        "lr": lr,
        "finite": (jnp.isfinite(value) & jnp.isfinite(grad_norm)).astype(jnp.float32),
    }
