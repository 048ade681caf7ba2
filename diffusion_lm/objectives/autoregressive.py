"""Autoregression: every token from those before it in its document."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.layouts import NoCanvas
from diffusion_lm.types import Alignment, Batch, Denoise, LogitsHead, Loss, loss_of

Array = jax.Array


def next_token_loss(head: LogitsHead, batch: Batch) -> Loss:
    """-log p of each target, read off the position before it. Every target has one: what begins a row is given."""
    if head.alignment is not Alignment.NEXT:
        raise ValueError(f"next-token loss needs logits that speak of the next token, not {head.alignment}")
    weights = shifted(batch.loss_mask).astype(jnp.float32)
    return loss_of(head, head.cross_entropy(shifted(batch.tokens), weights), jnp.sum(weights))


def shifted(a: Array) -> Array:
    """[B, L] -> [B, L]: each position's right neighbour; zero at the end."""
    return jnp.pad(a[:, 1:], ((0, 0), (0, 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveLoss:
    """The exact negative log likelihood, in nats a target."""

    layout = NoCanvas()
    trains_ar = True

    def __call__(self, denoise: Denoise, process, key: Array, batch: Batch) -> dict[str, Loss]:
        del process, key  # nothing is random here
        t = jnp.zeros((batch.tokens.shape[0], 1))
        head = denoise(batch.tokens, t, attention=Causal(), positions=batch.positions, segment_ids=batch.segment_ids)
        return {"causal": next_token_loss(head, batch)}
