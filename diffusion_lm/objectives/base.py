"""What an objective is."""

from typing import Any, Protocol

import jax

from diffusion_lm.layouts import Layout
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


class Objective(Protocol):
    """A frozen dataclass: the training loss of a network on a batch, in nats, and what the network learns by it.

    layout     which positions are denoised together
    trains_ar  the network learns to predict the next token with causal attention
    """

    layout: Layout
    trains_ar: bool

    def __call__(self, denoise: Denoise, process: Any, key: Array, batch: Batch) -> dict[str, Loss]:
        """The parts of the loss by name. Each has the batch's number of targets as its weight; training minimises
        their sum.

        An objective that trains another loss than it wants reported also has `bound`, called alike: what evaluation
        and comparison ask.
        """
