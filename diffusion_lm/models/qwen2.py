"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values."""

from diffusion_lm.models import llama
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf
from diffusion_lm.nn.specs import AttentionSpec

__all__ = ["MODEL_TYPES", "attention_of", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("qwen2",)


def attention_of(config: ConfigReader) -> AttentionSpec:
    """Heads of a config in Qwen2's words. Its sliding window is declared and not used."""
    config.expect("use_sliding_window", False)
    config.ignore("sliding_window", "max_window_layers", "layer_types")
    return llama.attention_of(config, bias=True, out_bias=False)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    return llama.described(config, attention_of(config))


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
