"""SEDD (arXiv 2310.16834), absorbing: a transformer conditioned on the noise, trained by score entropy.

Its logits are what its code has before `scale_by_sigma`: those that `processes.score.AbsorbingScore` takes.
"""

import functools

from diffusion_lm.layouts import WholeRow
from diffusion_lm.models import dit
from diffusion_lm.models.dit import TOKENIZER, is_buffer
from diffusion_lm.models.family import ConfigReader, Described
from diffusion_lm.processes.score import AbsorbingScore

__all__ = ["KEYS", "MODEL_TYPES", "TOKENIZER", "buffers", "describe", "is_buffer", "leaves"]
MODEL_TYPES = ()
KEYS = ("graph", "model", "noise", "tokens")


def describe(config: ConfigReader) -> Described:
    """The network that a config.json asks for."""
    config.ignore("data", "eval", "ngpus", "optim", "sampling", "training", "wandb_name", "work_dir")
    graph, noise, model = (config.part(key) for key in ("graph", "noise", "model"))
    graph.expect("type", "absorb")
    graph.ignore("file", "report_all")
    noise.expect("type", "loglinear")
    noise.ignore("sigma_min", "sigma_max")  # of the geometric noise
    model.expect("type", "ddit")
    model.expect("scale_by_sigma", True)
    model.ignore("name")
    spec = dit.network(model, tokens=config.size("tokens"), width="hidden_size", time="noise")
    context = model.size("length")
    for reader in (graph, noise, model):
        reader.finish()
    return Described(spec=spec, layout=WholeRow(), trains_ar=False, context=context, process=AbsorbingScore())


leaves, buffers = functools.partial(dit.leaves, top=""), functools.partial(dit.buffers, top="")
