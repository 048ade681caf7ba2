"""What an objective is, and the steps that all denoising objectives share: times, noise, one forward pass, weights."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusion_lm.layouts import Layout
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Alignment, Batch, Denoise, LogitsHead, Loss, NoisyEmbeddings, loss_of

Array = jax.Array


class Objective(Protocol):
    """A training loss, in nats. Implementations are frozen dataclasses that inherit from this class.

    Attributes:
        layout: which positions are denoised together.
        trains_ar: whether the network predicts the next token with causal attention.
        draft_length: masks that it is trained to predict behind a text, each the token after it; 0 for none.
    """

    layout: Layout
    trains_ar: bool
    draft_length: int = 0

    def stages(self) -> "tuple[tuple[float, Objective], ...]":
        """What trains in turn over a run: objectives, each with the share of the updates after which it ends.

        Each has an update of its own shapes, and all have the same parts.
        """
        return ((1.0, self),)

    @property
    def frozen(self) -> Mapping[str, str]:
        """Trained networks that the loss needs: keyword argument of `__call__` -> workdir. They get no gradient."""
        return {}

    def __call__(self, denoise: Denoise, process: Any, key: Array, batch: Batch, **frozen: Denoise) -> dict[str, Loss]:
        """The training loss.

        Args:
            denoise: the network.
            process: the noise.
            key: a random key.
            batch: rows [B, L].
            frozen: the networks that the property `frozen` names.

        Returns:
            Parts by name, "causal" (next-token prediction) or "canvas" (denoising), each with the batch's number of
            targets as its weight. Training minimises their sum.

        Raises:
            ValueError: if process, batch and objective don't go together.
        """

    def elbo(self, denoise: Denoise, process: Any, key: Array, batch: Batch) -> dict[str, Loss]:
        """The negative log likelihood or its upper bound (the negative ELBO): what evaluation reports.

        The default is the training loss; an objective that minimises something else overrides it.
        """
        return self(denoise, process, key, batch)


def draw_times(key: Array, shape: tuple[int, int], num_timesteps: int = 0) -> Array:
    """Times in (0, 1]: each is uniform, and together they are stratified (VDM, arXiv 2107.00630, appendix I.1).

    One uniform number shifts an even grid over all entries, so that the loss varies far less than with independent
    times.

    Args:
        key: a random key.
        shape: rows and spans, [B, n].
        num_timesteps: T of the grid 1/T, 2/T, ..., 1; 0 for continuous time.

    Returns:
        float32 [B, n].
    """
    size = shape[0] * shape[1]
    grid = jnp.arange(size, dtype=jnp.float32).reshape(shape) / size
    t = 1.0 - (jax.random.uniform(key, (1, 1)) + grid) % 1.0
    return jnp.ceil(t * num_timesteps) / num_timesteps if num_timesteps else t


def check_num_timesteps(num_timesteps: int) -> None:
    """Raises ValueError for a negative number of timesteps."""
    if num_timesteps < 0:
        raise ValueError(f"objective.num_timesteps must be at least 1, or 0 for continuous time; got {num_timesteps}")


def corrupt(process: Process, key: Array, batch: Batch, t: Array) -> Array:
    """x_t ~ q(x_t | x_0), int32 [B, L]; context stays clean."""
    return jnp.where(batch.context_mask, batch.tokens, process.corrupt(key, batch.tokens, t))


def noised_mask(batch: Batch) -> Array:
    """bool [B, L]: the positions that noise falls on and a loss scores: all of a document except context."""
    return ~batch.context_mask & (batch.segment_ids > 0)


def predict(
    denoise: Denoise, layout: Layout, batch: Batch, t: Array, tokens: Array, embeddings: NoisyEmbeddings | None = None
) -> tuple[LogitsHead, LogitsHead | None]:
    """One forward pass on noisy rows in the layout's attention pattern.

    Args:
        denoise: the network.
        layout: says whether the clean rows go through the same pass.
        batch: the clean rows [B, L], as `layout.prepare` returns them.
        t: float32 [B, n], the time of each span.
        tokens: int32 [B, L], the noisy rows.
        embeddings: inputs in place of the tokens' embeddings.

    Returns:
        The head of the noisy positions, and that of the clean ones (None where only noisy rows go through).
    """
    attention = layout.attention
    inputs = {} if embeddings is None else {"embeddings": embeddings}
    inputs |= {"attention": attention, "positions": batch.positions, "segment_ids": batch.segment_ids}
    if len(attention.alignments) == 1:
        return denoise(tokens, t, **inputs), None
    return denoise(attention.join(tokens, batch.tokens), attention.join(t, jnp.zeros_like(t)), **inputs)


def per_target(head: LogitsHead, total: Array, batch: Batch, share: float = 1.0) -> Loss:
    """A Loss of `total` nats whose weight is `share` of the batch's number of targets."""
    return loss_of(head, total, share * jnp.sum(batch.loss_mask, dtype=jnp.float32))


def denoising_loss(
    denoise: Denoise, process: Process, key: Array, batch: Batch, *, layout: Layout, num_timesteps: int
) -> tuple[Loss, LogitsHead | None]:
    """The negative ELBO of a process: each span of each row is noised at its own time, and one pass denoises it.

    Args:
        denoise, process, key, batch: as in `Objective.__call__`.
        layout: which positions share a time and an attention span.
        num_timesteps: T; 0 for continuous time.

    Returns:
        The loss of the noisy positions, and the head of the clean ones (see `predict`).

    Raises:
        ValueError: if the layout doesn't divide the rows, or the network predicts the next token.
    """
    time_key, noise_key = jax.random.split(key)
    batch = layout.prepare(batch)
    rows, length = batch.tokens.shape
    t = draw_times(time_key, (rows, layout.num_spans(length)), num_timesteps)
    xt = corrupt(process, noise_key, batch, t)
    head, clean = predict(denoise, layout, batch, t, xt)
    if head.alignment is not Alignment.SAME:
        raise ValueError(f"denoising needs logits that predict the same position's token, not {head.alignment}")
    total = process.nelbo(head, batch.tokens, xt, t, noised_mask(batch).astype(jnp.float32), num_timesteps)
    return per_target(head, total, batch), clean
