"""SDAR (arXiv 2510.06303): Qwen3 that denoises a block of masks after clean blocks; logits of the same position."""

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.layouts import Blocks
from diffusion_lm.models import llama, qwen3
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("sdar",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.ignore("fuse_cross_entropy", "debug")
    size = config.size("block_size", config.size("block_length", 4))
    mask = config.take("mask_token_id", None)
    layout = Blocks(size=size, prefix=BlockCausal(size))
    return llama.described(config, qwen3.attention_of(config), layout=layout, mask=mask)


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
