"""The negative evidence lower bound of a noise process, the whole row one canvas: what it costs to undo the noise.

E over t and x_t of what the process says a pass at t costs (`processes.base.Process.nelbo`), in continuous time or in
T steps: the T-step bound lies above the continuous one and falls towards it as T grows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import Full
from diffusion_lm.layouts import WholeRow
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Alignment, Batch, Denoise, LogitsHead, Loss, loss_of

Array = jax.Array


def draw_times(key: Array, shape: tuple[int, int], num_timesteps: int = 0) -> Array:
    """float32 of `shape` in (0, 1], on a grid of `steps` if not 0: one uniform, spread evenly over all entries (low
    discrepancy).

    Each entry alone is uniform, together they cover the interval: the loss varies far less than with independent
    times (VDM, arXiv 2107.00630, appendix I.1).
    """
    size = shape[0] * shape[1]
    grid = jnp.arange(size, dtype=jnp.float32).reshape(shape) / size
    t = 1.0 - (jax.random.uniform(key, (1, 1)) + grid) % 1.0
    return jnp.ceil(t * num_timesteps) / num_timesteps if num_timesteps else t


def noise_loss(
    read: Callable[[Array, Array], tuple[LogitsHead, Any]],
    process: Process,
    key: Array,
    batch: Batch,
    spans: int,
    num_timesteps: int,
) -> tuple[Loss, Any]:
    """Noises the batch, each of `spans` spans a row at a time of its own, and asks `read` what it makes of it.

    read(xt [B, L], t [B, spans]) -> the readout of the noisy positions, and whatever else it read, which is returned
    beside the loss. All of a document is noised and scored but what is given; the weight counts targets.
    """
    time_key, noise_key = jax.random.split(key)
    t = draw_times(time_key, (batch.tokens.shape[0], spans), num_timesteps)
    xt = jnp.where(batch.context_mask, batch.tokens, process.corrupt(noise_key, batch.tokens, t))
    head, rest = read(xt, t)
    if head.alignment is not Alignment.SAME:
        raise ValueError(f"a bound needs logits that speak of the same token, not {head.alignment}")
    scored = (~batch.context_mask & (batch.segment_ids > 0)).astype(jnp.float32)
    total = process.nelbo(head, batch.tokens, xt, t, scored, num_timesteps)
    return loss_of(head, total, jnp.sum(batch.loss_mask, dtype=jnp.float32)), rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELBO:
    """The bound with the whole row as one canvas, read both ways. steps: 0 for continuous time, else T.

    Documents that share a row are one text here, and what is given of later ones is noised and scored but not counted:
    a canvas that showed where they begin and end would tell their lengths for free.
    """

    num_timesteps: int = 0
    layout = WholeRow()
    trains_ar = False

    def __post_init__(self):
        check_num_timesteps(self.num_timesteps)

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        batch = one_text(batch)

        def read(xt, t):
            return denoise(xt, t, attention=Full(), positions=batch.positions, segment_ids=batch.segment_ids), None

        loss, _ = noise_loss(read, process, key, batch, 1, self.num_timesteps)
        return {"canvas": loss}


def check_num_timesteps(num_timesteps: int) -> None:
    """Raises ValueError for a number of steps that can't be."""
    if num_timesteps < 0:
        raise ValueError(
            f"objective.num_timesteps must be 0 (continuous time) or a number of steps, not {num_timesteps}"
        )


def one_text(batch: Batch) -> Batch:
    """The rows [B, L] without borders between documents: one segment, positions counted through, and nothing given
    beyond the first document."""
    at = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
    return batch.replace(
        segment_ids=jnp.minimum(batch.segment_ids, 1),
        positions=jnp.broadcast_to(at, batch.tokens.shape),
        context_mask=batch.context_mask & (batch.segment_ids == batch.segment_ids[:, :1]),
    )
