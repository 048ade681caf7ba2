"""Autoregression: every token from those before it in its document."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.types import Alignment, Batch, Causal, Denoise, Loss, Readout, loss_of

Array = jax.Array


def next_token_loss(readout: Readout, batch: Batch) -> Loss:
    """-log p of each target, read off the position before it. Every target has one: what begins a row is given."""
    if readout.alignment is not Alignment.NEXT:
        raise ValueError(f"next-token loss needs logits that speak of the next token, not {readout.alignment}")
    weights = shifted(batch.target).astype(jnp.float32)
    return loss_of(readout, readout.cross_entropy(shifted(batch.tokens), weights), jnp.sum(weights))


def shifted(a: Array) -> Array:
    """[B, L] -> [B, L]: each position's right neighbour; zero at the end."""
    return jnp.pad(a[:, 1:], ((0, 0), (0, 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """The exact negative log likelihood, in nats a target."""

    canvas = 1
    causal = True
    prefix = None

    def __call__(self, denoise: Denoise, process, key: Array, batch: Batch) -> dict[str, Loss]:
        del process, key  # nothing is random here
        t = jnp.zeros((batch.tokens.shape[0], 1))
        readout = denoise(batch.tokens, t, reading=Causal(), positions=batch.positions, segments=batch.segments)
        return {"causal": next_token_loss(readout, batch)}
