"""MDLM (arXiv 2406.07524): SEDD's transformer with full attention, trained on masks."""

from diffusion_lm.layouts import WholeRow
from diffusion_lm.models import dit
from diffusion_lm.models.dit import TOKENIZER, buffers, is_buffer, leaves
from diffusion_lm.models.family import ConfigReader, Described

__all__ = ["MODEL_TYPES", "TOKENIZER", "buffers", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ("mdlm",)


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    told = config.expect("time_conditioning", False, True)
    spec = dit.network(config, tokens=config.size("vocab_size") - 1, time="noise" if told else "zero")
    return Described(spec=spec, layout=WholeRow(), trains_ar=False, context=config.size("model_length"))
