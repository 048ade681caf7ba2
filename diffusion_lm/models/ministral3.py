"""Ministral 3: Llama with yarn's rope, whose queries grow with the logarithm of their position."""

from diffusion_lm.models import llama
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("ministral3",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    return llama.described(config, llama.attention_of(config))


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
