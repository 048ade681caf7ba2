"""The negative evidence lower bound of masked diffusion: what it costs to write x0 by revealing masks.

Continuous time: E_t [ -alpha'(t) / (1 - alpha(t)) sum over masked i of -log p(x0_i | x_t) ]
(MDLM, arXiv 2406.07524, equation 10; MD4, arXiv 2406.04329, equation 4). T steps: t = i / T, s = t - 1 / T, weight
T (alpha_s - alpha_t) / (1 - alpha_t) in place of the rate (MDLM, equation 8): above the continuous bound, and falling
towards it as T grows. The process says both weights.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.processes.base import Process, spread
from diffusion_lm.types import Alignment, Batch, Bidirectional, Denoise, Loss, Readout

Array = jax.Array


def draw_times(key: Array, shape: tuple[int, int]) -> Array:
    """float32 of `shape` in (0, 1]: one uniform, spread evenly over all entries (low discrepancy).

    Each entry alone is uniform, together they cover the interval: the loss varies far less than with independent
    times (VDM, arXiv 2107.00630, appendix I.1).
    """
    size = shape[0] * shape[1]
    grid = jnp.arange(size, dtype=jnp.float32).reshape(shape) / size
    return 1.0 - (jax.random.uniform(key, (1, 1)) + grid) % 1.0


def noisy_times(key: Array, process: Process, shape: tuple[int, int], steps: int) -> tuple[Array, Array]:
    """Times t float32 [B, n], and what a masked position counts at each: the rate, or that of one of `steps` steps."""
    t = draw_times(key, shape)
    if steps == 0:
        return t, process.rate_weight(t)
    t = jnp.ceil(t * steps) / steps
    return t, steps * process.step_weight(t, t - 1 / steps)


def noised(key: Array, process: Process, batch: Batch, t: Array) -> tuple[Array, Array]:
    """x_t, and where a document holds noise: all is corrupted but what is given."""
    xt, changed = process.corrupt(key, batch.tokens, t)
    return jnp.where(batch.given, batch.tokens, xt), changed & ~batch.given & (batch.segments > 0)


def masked_loss(readout: Readout, batch: Batch, masked: Array, weight: Array) -> Loss:
    """The bound's sum over masked positions, and the count of targets; weight float32 [B, n] as the times."""
    if readout.alignment is not Alignment.SAME:
        raise ValueError(f"a bound needs logits that speak of the same token, not {readout.alignment}")
    weights = jnp.where(masked, spread(weight, batch.tokens.shape[1]), 0.0)
    total = readout.cross_entropy(batch.tokens, weights)
    return Loss(sum=total, weight=jnp.sum(batch.target, dtype=jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedELBO:
    """The bound with the whole row as one canvas, read both ways. steps: 0 for continuous time, else T.

    Documents that share a row are one text here, and what is given of later ones is noised and scored but not counted:
    a canvas that showed where they begin and end would tell their lengths for free.
    """

    steps: int = 0
    canvas = 0
    causal = False
    prefix = None

    def __post_init__(self):
        check_steps(self.steps)

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        time_key, noise_key = jax.random.split(key)
        batch = one_text(batch)
        t, weight = noisy_times(time_key, process, (batch.tokens.shape[0], 1), self.steps)
        xt, masked = noised(noise_key, process, batch, t)
        readout = denoise(xt, t, reading=Bidirectional(), positions=batch.positions, segments=batch.segments)
        return {"canvas": masked_loss(readout, batch, masked, weight)}


def check_steps(steps: int) -> None:
    """Raises ValueError for a number of steps that can't be."""
    if steps < 0:
        raise ValueError(f"objective.steps must be 0 (continuous time) or a number of steps, not {steps}")


def one_text(batch: Batch) -> Batch:
    """The rows [B, L] without borders between documents: one segment, positions counted through, and nothing given
    beyond the first document."""
    at = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
    return batch.replace(
        segments=jnp.minimum(batch.segments, 1),
        positions=jnp.broadcast_to(at, batch.tokens.shape),
        given=batch.given & (batch.segments == batch.segments[:, :1]),
    )
