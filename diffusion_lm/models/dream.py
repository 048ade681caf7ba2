"""Dream and its likes (arXiv 2508.15487): Qwen2 with full attention that predicts the next token all the same.

The head shifts its logits by one position.
"""

import dataclasses

from diffusion_lm.layouts import WholeRow
from diffusion_lm.models import llama, qwen2
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("Dream",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.expect("use_mrope", False)
    mask = config.size("mask_token_id")
    found = llama.described(config, qwen2.attention_of(config), layout=WholeRow(), mask=mask)
    return found._replace(spec=dataclasses.replace(found.spec, logit_shift=True))


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
