"""Autoregression: the network predicts each token from those before it in its document."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.layouts import NoCanvas
from diffusion_lm.objectives.base import Objective
from diffusion_lm.types import Alignment, Batch, Denoise, LogitsHead, Loss, loss_of

Array = jax.Array


def next_token_loss(head: LogitsHead, batch: Batch) -> Loss:
    """-log p of each target, from the logits one position before it (a row's first token is context).

    Raises ValueError if the head predicts the same position's token.
    """
    if head.alignment is not Alignment.NEXT:
        raise ValueError(f"next-token loss needs logits that predict the next token, not {head.alignment}")
    # Each position's right neighbour; zero at the end.
    targets, mask = (jnp.pad(a[:, 1:], ((0, 0), (0, 1))) for a in (batch.tokens, batch.loss_mask))
    weights = mask.astype(jnp.float32)
    return loss_of(head, head.cross_entropy(targets, weights), jnp.sum(weights))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveLoss(Objective):
    """The exact negative log likelihood, in nats per target."""

    layout = NoCanvas()
    trains_ar = True

    def __call__(self, denoise: Denoise, process, key: Array, batch: Batch) -> dict[str, Loss]:
        del process, key  # nothing is random
        t, attention = jnp.zeros((batch.tokens.shape[0], 1)), self.layout.attention
        head = denoise(batch.tokens, t, attention=attention, positions=batch.positions, segment_ids=batch.segment_ids)
        return {"causal": next_token_loss(head, batch)}
