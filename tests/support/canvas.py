"""Canvas samplers over a network that is a function of tokens and times."""

from diffusion_lm.samplers import base


def denoised(sampler, denoise, canvas, **options):
    """The last state of a whole denoising; denoise: (tokens, t) -> logits."""
    return recorded(sampler, denoise, canvas, None, **options)[0]


def recorded(sampler, denoise, canvas, record, **options):
    """The last state, and record(state) of each step."""
    out = base.denoise(sampler, predict(denoise), canvas, record=record, **options)
    return out.state, out.trace


def step(sampler, denoise, state):
    """One step by hand: what `base.denoise` makes of a sampler's query and update."""
    query = sampler.query(state)
    return sampler.update(state, denoise(query.tokens, query.t))


def predict(denoise):
    """A network that keeps no cache."""
    return lambda query, cache: (denoise(query.tokens, query.t), cache)
