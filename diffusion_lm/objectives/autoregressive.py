"""Autoregression: the network predicts each token from those before it in its document."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.layouts import NoCanvas
from diffusion_lm.objectives.base import Objective
from diffusion_lm.types import Alignment, Batch, Denoise, LogitsHead, Loss, cross_entropy, loss_of

Array = jax.Array


def next_token_loss(head: LogitsHead, batch: Batch) -> Loss:
    """-log p of each target, from the logits one position before it (a row's first token is context).

    Raises ValueError if the head predicts the same position's token.
    """
    targets, weights = _next_tokens(head, batch)
    return loss_of(head, head.cross_entropy(targets, weights), jnp.sum(weights))


def next_token_nats(head: LogitsHead, batch: Batch) -> Array:
    """float32 [B, L]: -log p of each target at its own position, 0 elsewhere. Raises as `next_token_loss`."""
    targets, weights = _next_tokens(head, batch)
    nats = jnp.where(weights > 0, head.map_positions(cross_entropy, targets), 0.0)
    return jnp.pad(nats[:, :-1], ((0, 0), (1, 0)))


def read_causally(denoise: Denoise, batch: Batch) -> LogitsHead:
    """What the network says to the next tokens of clean rows."""
    t = jnp.zeros((batch.tokens.shape[0], 1))
    return denoise(batch.tokens, t, attention=Causal(), positions=batch.positions, segment_ids=batch.segment_ids)


def _next_tokens(head: LogitsHead, batch: Batch) -> tuple[Array, Array]:
    """Each position's right neighbour, zero at the end, and 1 where it is a target."""
    if head.alignment is not Alignment.NEXT:
        raise ValueError(f"next-token loss needs logits that predict the next token, not {head.alignment}")
    targets, mask = (jnp.pad(a[:, 1:], ((0, 0), (0, 1))) for a in (batch.tokens, batch.loss_mask))
    return targets, mask.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveLoss(Objective):
    """The exact negative log likelihood, in nats per target."""

    layout = NoCanvas()
    trains_ar = True

    def __call__(self, denoise: Denoise, process, key: Array, batch: Batch) -> dict[str, Loss]:
        del process, key  # nothing is random
        return {"causal": next_token_loss(read_causally(denoise, batch), batch)}
