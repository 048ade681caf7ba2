"""How far approximate caches drift from exact passes: the suite `cache_drift` of launch.benchmark.

Measured for each policy and refresh interval: the share of tokens equal to those of exact passes, the KL divergence of
the predictions at masks from an exact pass over the same canvas, and the positions and time saved.
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.build import LoadedModel, load_for_inference
from diffusion_lm.layouts import WholeRow
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Generation, Prompt
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.cache_policy import CachePolicy, DelayedCache, DualCache, PrefixCache
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.visualize.plots import curve
from launch.benchmarks import timing
from launch.benchmarks.timing import Row, Timing
from launch.benchmarks.tradeoffs import held_out_prompts

Array = jax.Array
log = logging.getLogger("diffusion_lm.cache_drift")
EXACT, NEVER = 1, 0
REFRESH = (EXACT, 2, 4, NEVER)  # steps between full recomputations
BLOCKS, STEPS_PER_BLOCK = 8, 8  # blocks of a canvas, denoising steps of each
TEMPERATURES = (0.0, 1.0)
REPEATS = 5


def cache_drift(workdir: str, out: Path) -> list[Row]:
    """All rows; writes a chart into the folder `out`. Raises ValueError unless whole rows of masks are denoised."""
    model = load_for_inference(workdir)
    objective = model.config.objective
    if objective.layout != WholeRow() or not isinstance(model.process, Absorbing):
        raise ValueError(f"--workdir={workdir}: approximate caches are for whole rows of masks: train a masked network")
    out.mkdir(parents=True, exist_ok=True)
    block, texts = -(-model.config.data.seq_len // BLOCKS), jnp.asarray(held_out_prompts(model)[::2])
    policies = {
        f"prefix {block}": PrefixCache(block_size=block),
        f"dual {block}": DualCache(block_size=block),
        "delayed": DelayedCache(),
    }
    rows, lines = _baselines(model, texts), {}
    for name, policy in policies.items():
        timings = _timings(model, policy, texts[:1])
        for temperature in TEMPERATURES:
            found = _at_temperature(model, name, policy, texts, temperature, None if temperature else timings)
            lines[f"{name}, temperature {temperature:g}"] = [row.value for row in found]
            rows += found
    never = BLOCKS * STEPS_PER_BLOCK
    labels = {"x_label": f"refresh interval in steps ({never}: never)", "y_label": "share of equal tokens"}
    xs = [refresh or never for refresh in REFRESH]
    curve(xs, lines, out / "cache_drift.svg", title="Tokens equal to those of exact passes", log_x=True, **labels)
    return rows


def _at_temperature(
    model: LoadedModel,
    name: str,
    policy: CachePolicy,
    texts: Array,
    temperature: float,
    timings: dict[int, Timing] | None,
) -> list[Row]:
    """A row for each refresh interval."""
    rows, exact = [], None
    for refresh in REFRESH:
        sampler = _sampler(model, policy, refresh, temperature)
        generation = _generation(model, sampler, texts)
        exact = generation if exact is None else exact
        nfe, watched = int(generation.nfe), generation.cache
        note = f"KL {float(watched.nats / watched.count):.1e} nats, {nfe} passes, "
        note += f"{int(generation.positions_computed) / nfe / sampler.canvas_length:.0%} of positions recomputed"
        rows.append(
            Row(
                name=f"{name}, refresh {refresh or 'never'}, temperature {temperature:g}",
                value=_agreement(generation.tokens, exact.tokens),
                unit="share of equal tokens",
                ratio=timings and timing.times_faster(timings[refresh], timings[EXACT]),
                note=note,
            )
        )
        log.info("%s: %.3f of tokens, %s", rows[-1].name, rows[-1].value, note)
    return rows


def _baselines(model: LoadedModel, texts: Array) -> list[Row]:
    """How much exact passes agree across arithmetic, seeds and prompts: the scale for all other rows."""
    rows = []
    for temperature in TEMPERATURES:
        sampler = _sampler(model, DelayedCache(), EXACT, temperature)
        exact = _generation(model, sampler, texts).tokens
        others = {
            "exact in float32": _generation(_in_float32(model), sampler, texts).tokens,
            "exact with another seed": _generation(model, sampler, texts, seed=1).tokens,
            "exact after another prompt": jnp.roll(exact, 1, axis=0),
        }
        for name, tokens in others.items():
            value = _agreement(tokens, exact)
            rows.append(Row(name=f"{name}, temperature {temperature:g}", value=value, unit="share of equal tokens"))
    return rows


def _in_float32(model: LoadedModel) -> LoadedModel:
    module = model.network.module
    execution = dataclasses.replace(module.exec, compute_dtype="float32")
    return model._replace(network=model.network.replace(module=module.clone(exec=execution)), prepared={})


def _timings(model: LoadedModel, policy: CachePolicy, text: Array) -> dict[int, Timing]:
    """Of greedy generation of one row."""
    cases = {
        refresh: functools.partial(_generation, model, _sampler(model, policy, refresh, 0.0), text, watch=False)
        for refresh in REFRESH
    }
    return timing.alternate(cases, repeats=REPEATS)


def _agreement(ours: Array, theirs: Array) -> float:
    return float(jnp.mean(ours == theirs))


def _sampler(model: LoadedModel, policy: CachePolicy, refresh: int, temperature: float) -> BlockDiffusion:
    """Without an end of text, so that all texts have one length."""
    tokenizer = model.tokenizer
    draw = SamplingParams(temperature=temperature, suppressed=(*tokenizer.suppressed, tokenizer.eos))
    return BlockDiffusion(
        sampler=Confidence(denoising_steps=BLOCKS * STEPS_PER_BLOCK, eos=-1, sampling=draw),
        approximate_cache=dataclasses.replace(policy, refresh_every=refresh),
        canvas_length=model.config.data.seq_len,
        align=0,
        mask=tokenizer.mask,
        eos=tokenizer.eos,
    )


def _generation(
    model: LoadedModel, sampler: BlockDiffusion, tokens: Array, *, seed: int = 0, watch: bool = True
) -> Generation:
    """The rest of the context after `tokens`, int32 [B, P]. Its cache is a `WatchedCache` if `watch` is set."""
    prompt = Prompt(tokens=tokens, length=jnp.full(len(tokens), tokens.shape[1], jnp.int32))
    bound = model.for_sampling(len(tokens) * sampler.canvas_length)
    network = WatchedDenoiser(network=bound, mask=sampler.mask) if watch else bound
    cache = network.empty_cache(len(tokens), sampler.canvas_length)
    keys = jax.random.split(jax.random.key(seed), len(tokens))
    return _generate(network, cache, prompt, keys, sampler=sampler, length=sampler.canvas_length - tokens.shape[1])


@functools.partial(jax.jit, static_argnames=("sampler", "length"))
def _generate(
    network: Any, cache: Any, prompt: Prompt, keys: Array, *, sampler: BlockDiffusion, length: int
) -> Generation:
    return sampler.generate(network, cache, prompt, keys, max_new_tokens=length)


@struct.dataclass
class WatchedCache:
    """A cache; the canvas int32 [B, L] at its latest tokens; KL(exact || approximate), float32 [], summed over `count`
    masks."""

    cache: Any
    canvas: Array
    nats: Array
    count: Array


@struct.dataclass
class WatchedDenoiser:
    """A network that makes an exact pass after each approximate one, and sums their divergence.

    Without an end of text every changed token is recomputed, so that `canvas` is the sampler's canvas.
    """

    network: BoundModel
    mask: int = struct.field(pytree_node=False)

    def empty_cache(self, rows: int, slots: int) -> WatchedCache:
        """The network's own cache, and a canvas of masks."""
        canvas, nothing = jnp.full((rows, slots), self.mask, jnp.int32), jnp.zeros(())
        return WatchedCache(cache=self.network.empty_cache(rows, slots), canvas=canvas, nats=nothing, count=nothing)

    def forward_positions(
        self, watched: WatchedCache, tokens: Array, at: Array, t: Array
    ) -> tuple[Array, WatchedCache]:
        """See `BoundModel.forward_positions`."""
        logits, cache = self.network.forward_positions(watched.cache, tokens, at, t)
        rows, length = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None], watched.canvas.shape[1]
        canvas = watched.canvas.at[rows, at].set(tokens, mode="drop")
        exact = self.network.denoise_canvas(self.network.empty_cache(at.shape[0], 0), canvas, t)
        exact = jnp.take_along_axis(exact, jnp.minimum(at, length - 1)[..., None], axis=1)
        log_p, log_q = jax.nn.log_softmax(exact, axis=-1), jax.nn.log_softmax(logits, axis=-1)
        nats = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        masks = (at < length) & (tokens == self.mask)
        total, count = watched.nats + jnp.sum(jnp.where(masks, nats, 0.0)), watched.count + jnp.sum(masks)
        return logits, WatchedCache(cache=cache, canvas=canvas, nats=total, count=count)
