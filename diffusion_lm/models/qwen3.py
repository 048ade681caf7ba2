"""Qwen3, dense (arXiv 2505.09388): Llama with norms of each head's queries and keys."""

from diffusion_lm.models import llama
from diffusion_lm.models.base import TransformerSpec
from diffusion_lm.models.family import ConfigReader, Described, decoder_leaves
from diffusion_lm.models.llama import is_buffer
from diffusion_lm.models.weights import Leaf
from diffusion_lm.nn.specs import AttentionSpec, NormSpec

__all__ = ["MODEL_TYPES", "attention_of", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("qwen3",)


def attention_of(config: ConfigReader) -> AttentionSpec:
    """Heads of a config in Qwen3's words. Its sliding window is declared and not used."""
    config.expect("use_sliding_window", False)
    config.ignore("sliding_window", "max_window_layers", "layer_types")
    norm = NormSpec(eps=float(config.take("rms_norm_eps", 1e-6)))
    return llama.attention_of(config, bias=config.expect("attention_bias", False, True), qk_norm=norm)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    return llama.described(config, attention_of(config))


def leaves(spec: TransformerSpec) -> list[Leaf]:
    """What fills each parameter."""
    return decoder_leaves(spec)
