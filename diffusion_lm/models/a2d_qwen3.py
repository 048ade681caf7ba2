"""A2D-Qwen3 (github.com/ZHZisZZ/dllm): Qwen3 turned into whole-row masked diffusion, or into block diffusion."""

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.layouts import Blocks, WholeRow
from diffusion_lm.models import llama, qwen3
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf

__all__ = ["MODEL_TYPES", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("a2d-qwen3", "a2d-qwen2")


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for. block_size is said where it was trained in blocks."""
    size, mask = config.take("block_size", 0), config.take("mask_token_id", None)
    layout = Blocks(size=size, prefix=BlockCausal(size)) if size else WholeRow()
    return llama.described(config, qwen3.attention_of(config), layout=layout, mask=mask)


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
