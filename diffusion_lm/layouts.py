"""Layouts: which positions of a row an objective denoises together, and what that means for rows and prompts.

    NoCanvas()            autoregression: one token after the other
    WholeRow()            the whole row is one canvas with full attention (MDLM, LLaDA)
    Blocks(size, prefix)  canvases of `size` positions, each conditioned on the finished text before it (BD3-LM)

`objective.layout` is one of these values. The batches, the caches and the samplers of a network follow from it.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal, Full
from diffusion_lm.types import Batch


class Layout:
    """What the layouts answer; the defaults are those of autoregression.

    denoises       the objective trains to fill canvases
    pad            positions that must follow an end of text in the training data, so that its canvas is full
    closed_by_eos  an end of text ends the canvas: every later position of it holds an end of text, too
    align          a sampler's canvases begin at multiples of this: 1 is anywhere, 0 only at the beginning of the row
    """

    denoises = False
    pad = 0
    closed_by_eos = False
    align = 1

    @property
    def attention(self) -> Causal:
        """The attention pattern of a training row."""
        return Causal()

    @property
    def prefix(self) -> Causal:
        """The attention pattern of finished text in a sampler's cache."""
        return Causal()

    def canvas_length(self, context: int) -> int:
        """Positions of a canvas, for a network with a context of `context` positions."""
        return 1

    def canvas_end(self, stop: int, row: int) -> int:
        """Where the canvas ends that holds position `stop` - 1, in a row of `row` positions."""
        return stop

    def round_up(self, length: int) -> int:
        """The smallest row of at least `length` positions that can be trained on."""
        return length

    def answer_start(self, prompt: int) -> int:
        """Where a training row begins the answer to a prompt of `prompt` positions, so that a canvas begins there if
        a sampler's would."""
        return prompt

    def num_spans(self, length: int) -> int:
        """Spans of a row of `length` positions that are noised each at its own time."""
        return 1

    def prepare(self, batch: Batch) -> Batch:
        """The batch [B, L] as the network is to be given it.

        Raises ValueError if such rows can't be trained on.
        """
        return batch


@dataclass(frozen=True)
class NoCanvas(Layout):
    """Nothing is denoised: the network predicts each token from the tokens before it."""


@dataclass(frozen=True)
class WholeRow(Layout):
    """The whole row is one canvas: full attention, no cache, the prompt lies in the canvas.

    Documents that share a row are one text, so that an end of text closes nothing.
    """

    denoises = True
    align = 0

    @property
    def attention(self) -> Full:
        return Full()

    def canvas_length(self, context: int) -> int:
        return context

    def canvas_end(self, stop: int, row: int) -> int:
        return row

    def prepare(self, batch: Batch) -> Batch:
        """One text a row: one segment, positions counted through, and no context after the first document."""
        index = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
        return batch.replace(
            segment_ids=jnp.minimum(batch.segment_ids, 1),
            positions=jnp.broadcast_to(index, batch.tokens.shape),
            context_mask=batch.context_mask & (batch.segment_ids == batch.segment_ids[:, :1]),
        )


@dataclass(frozen=True)
class Blocks(Layout):
    """Canvases of `size` positions. Each attends to itself and to the finished text before it.

    Args:
        size: positions of a canvas.
        prefix: the attention pattern of finished text: causal, or causal over blocks of `size` positions.
    """

    size: int
    prefix: Causal | BlockCausal = Causal()  # noqa: RUF009 (immutable)

    denoises = True
    closed_by_eos = True

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"objective.block_size must be at least 1; got {self.size}")

    @property
    def pad(self) -> int:
        return self.size - 1

    @property
    def align(self) -> int:
        return self.prefix.granularity

    @property
    def attention(self) -> BlockDiffusionTraining:
        return BlockDiffusionTraining(self.size, self.prefix)

    def canvas_length(self, context: int) -> int:
        return self.size

    def canvas_end(self, stop: int, row: int) -> int:
        return min(self.round_up(stop), row)

    def round_up(self, length: int) -> int:
        return -(-length // self.size) * self.size

    def answer_start(self, prompt: int) -> int:
        return self.round_up(prompt) if self.align == 1 else prompt

    def num_spans(self, length: int) -> int:
        return length // self.size

    def prepare(self, batch: Batch) -> Batch:
        length = batch.tokens.shape[1]
        if length % self.size:
            raise ValueError(
                f"blocks of {self.size} do not divide rows of {length}: set data.seq_len to a multiple of {self.size}"
            )
        return batch
