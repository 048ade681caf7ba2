"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5 that denoises blocks of masks after clean blocks.

Its logits predict the next token: the head shifts them by one position, inside a block too.
"""

import dataclasses

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.layouts import Blocks
from diffusion_lm.models import llama, qwen2
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("Fast_dLLM_Qwen",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    size, mask = config.size("bd_size"), config.size("mask_token_id", 151_665)
    layout = Blocks(size=size, prefix=BlockCausal(size))
    found = llama.described(config, qwen2.attention_of(config), layout=layout, mask=mask)
    return found._replace(spec=dataclasses.replace(found.spec, logit_shift=True))


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
