"""BD3-LM (arXiv 2503.09573): MDLM's transformer that denoises a block of masks after clean blocks."""

from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.layouts import Blocks
from diffusion_lm.models import dit
from diffusion_lm.models.dit import TOKENIZER, buffers, is_buffer, leaves
from diffusion_lm.models.family import ConfigReader, Described

__all__ = ["MODEL_TYPES", "TOKENIZER", "buffers", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("bd3lm",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    for key, value in {"adaln": True, "causal": False, "cross_attn": True, "time_conditioning": False}.items():
        config.expect(key, value)
    config.ignore("attn_backend", "var_min")  # the second: which times training draws
    size = config.size("block_size")
    spec = dit.network(config, tokens=config.size("vocab_size") - 1, time="zero")
    layout = Blocks(size=size, prefix=BlockCausal(size))
    return Described(spec=spec, layout=layout, trains_ar=False, context=config.size("model_length"))
