"""How far approximate caches drift from exact passes: the suite `drift` of launch.benchmark.

For each policy and refresh interval: how many tokens are those that exact passes write, how far what is said of masks
is from what an exact pass says of the same canvas, and what is saved.
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion_lm.build import LoadedModel, load_for_inference
from diffusion_lm.layouts import WholeRow
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.approximate_cache import ApproximateCache, ApproximateGeneration
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.cache_policy import CachePolicy, DelayedCache, DualCache, PrefixCache
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.visualize.plots import curve
from launch.benchmarks import timing
from launch.benchmarks.timing import Row, Timing
from launch.benchmarks.tradeoffs import begun

Array = jax.Array
log = logging.getLogger("diffusion_lm.drift")
EXACT, NEVER = 1, 0
REFRESH = (EXACT, 2, 4, NEVER)  # passes from one that reads all positions to the next
BLOCKS, A_BLOCK = 8, 8  # of a canvas, and passes for each
TEMPERATURES = (0.0, 1.0)
REPEATS = 5


def drift(workdir: str, out: Path) -> list[Row]:
    """All rows; a chart is written into the folder `out`. Raises ValueError unless the network fills in whole rows."""
    model = load_for_inference(workdir)
    objective = model.config.objective
    if objective.layout != WholeRow() or not isinstance(model.process, Absorbing):
        raise ValueError(f"--workdir={workdir}: approximate caches are for masks in whole rows: train a masked network")
    out.mkdir(parents=True, exist_ok=True)
    block, texts = -(-model.config.data.seq_len // BLOCKS), jnp.asarray(begun(model)[::2])
    policies = {
        f"prefix {block}": PrefixCache(block_size=block),
        f"dual {block}": DualCache(block_size=block),
        "delayed": DelayedCache(),
    }
    rows, lines = _by_chance(model, texts), {}
    for name, policy in policies.items():
        timings = _timings(model, policy, texts[:1])
        for temperature in TEMPERATURES:
            found = _at_temperature(model, name, policy, texts, temperature, None if temperature else timings)
            lines[f"{name}, temperature {temperature:g}"] = [row.value for row in found]
            rows += found
    labels = {"x_label": f"log2 of the refresh interval ({BLOCKS * A_BLOCK}: never)", "y_label": "share of tokens"}
    xs = np.log2([refresh or BLOCKS * A_BLOCK for refresh in REFRESH])
    curve(xs, lines, out / "drift.svg", title="Tokens that exact passes write, too", **labels)
    return rows


def _at_temperature(
    model: LoadedModel,
    name: str,
    policy: CachePolicy,
    texts: Array,
    temperature: float,
    timings: dict[int, Timing] | None,
) -> list[Row]:
    """A row a refresh interval."""
    rows, exact = [], None
    for refresh in REFRESH:
        writer = _writer(model, policy, refresh, temperature)
        generation = _written(model, writer, texts)
        exact = generation if exact is None else exact
        nfe, said = int(generation.nfe), generation.cache
        note = f"KL {float(said.nats / said.count):.1e} nats, {nfe} passes, "
        note += f"{int(generation.read) / nfe / writer.canvas:.0%} of positions read"
        rows.append(
            Row(
                name=f"{name}, refresh {refresh or 'never'}, temperature {temperature:g}",
                value=_agreement(generation.tokens, exact.tokens),
                unit="share of tokens",
                ratio=timings and timing.times_faster(timings[refresh], timings[EXACT]),
                note=note,
            )
        )
        log.info("%s: %.3f of tokens, %s", rows[-1].name, rows[-1].value, note)
    return rows


def _by_chance(model: LoadedModel, texts: Array) -> list[Row]:
    """What agrees with exact passes in one block for reasons that are no cache's: the scale for all other rows."""
    rows = []
    for temperature in TEMPERATURES:
        writer = _writer(model, DelayedCache(), EXACT, temperature)
        exact = _written(model, writer, texts).tokens
        others = {
            "exact with float32 products": _written(_in_float32(model), writer, texts).tokens,
            "exact with another seed": _written(model, writer, texts, seed=1).tokens,
            "exact behind another prompt": jnp.roll(exact, 1, axis=0),
        }
        for name, tokens in others.items():
            value = _agreement(tokens, exact)
            rows.append(Row(name=f"{name}, temperature {temperature:g}", value=value, unit="share of tokens"))
    return rows


def _in_float32(model: LoadedModel) -> LoadedModel:
    module = model.bound.module
    architecture = dataclasses.replace(module.architecture, compute_dtype="float32")
    return model._replace(bound=model.bound.replace(module=module.clone(architecture=architecture)), ready={})


def _timings(model: LoadedModel, policy: CachePolicy, text: Array) -> dict[int, Timing]:
    """Greedy writing of one row."""
    legs = {
        refresh: functools.partial(_written, model, _writer(model, policy, refresh, 0.0), text, watch=False)
        for refresh in REFRESH
    }
    return timing.alternate(legs, repeats=REPEATS)


def _agreement(ours: Array, theirs: Array) -> float:
    return float(jnp.mean(ours == theirs))


def _writer(model: LoadedModel, policy: CachePolicy, refresh: int, temperature: float) -> ApproximateCache:
    """No end of text: all write equally much."""
    tokenizer = model.tokenizer
    draw = SamplingParams(temperature=temperature, suppressed=(*tokenizer.suppressed, tokenizer.eos))
    return ApproximateCache(
        sampler=Confidence(passes=BLOCKS * A_BLOCK, eos=-1, draw=draw),
        policy=dataclasses.replace(policy, refresh=refresh),
        canvas=model.config.data.seq_len,
        mask=tokenizer.mask,
        eos=tokenizer.eos,
    )


def _written(
    model: LoadedModel, writer: ApproximateCache, tokens: Array, *, seed: int = 0, watch: bool = True
) -> ApproximateGeneration:
    """The rest of the context behind `tokens`, int32 [B, P]; with `Watched` as its cache, unless nobody watches."""
    prompt = Prompt(tokens=tokens, length=jnp.full(len(tokens), tokens.shape[1], jnp.int32))
    bound = model.for_sampling(len(tokens) * writer.canvas)
    network = Watching(bound=bound, mask=writer.mask) if watch else bound
    cache = network.empty_cache(len(tokens), writer.canvas)
    keys = jax.random.split(jax.random.key(seed), len(tokens))
    return _generate(network, cache, prompt, keys, writer=writer, length=writer.canvas - tokens.shape[1])


@functools.partial(jax.jit, static_argnames=("writer", "length"))
def _generate(
    network: Any, cache: Any, prompt: Prompt, keys: Array, *, writer: ApproximateCache, length: int
) -> ApproximateGeneration:
    return writer.generate(network, cache, prompt, keys, length=length)


@struct.dataclass
class Watched:
    """A cache; the canvas int32 [B, L] as it was read; and KL(exact || said), float32 [], summed over `count` masks."""

    cache: Any
    canvas: Array
    nats: Array
    count: Array


@struct.dataclass
class Watching:
    """A network that makes an exact pass beside each approximate one. (Without an end of text, every token that changes
    is read again, and the canvas as it was read is the canvas at all masks that matter.)"""

    bound: BoundModel
    mask: int = struct.field(pytree_node=False)

    def empty_cache(self, rows: int, slots: int) -> Watched:
        """The network's own, and nothing seen."""
        canvas, nothing = jnp.full((rows, slots), self.mask, jnp.int32), jnp.zeros(())
        return Watched(cache=self.bound.empty_cache(rows, slots), canvas=canvas, nats=nothing, count=nothing)

    def forward_positions(self, seen: Watched, tokens: Array, at: Array, t: Array) -> tuple[Array, Watched]:
        """See `Bound.forward_positions`."""
        logits, cache = self.bound.forward_positions(seen.cache, tokens, at, t)
        rows, length = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None], seen.canvas.shape[1]
        canvas = seen.canvas.at[rows, at].set(tokens, mode="drop")
        exact = self.bound.read_canvas(self.bound.empty_cache(at.shape[0], 0), canvas, t)
        exact = jnp.take_along_axis(exact, jnp.minimum(at, length - 1)[..., None], axis=1)
        log_p, log_q = jax.nn.log_softmax(exact, axis=-1), jax.nn.log_softmax(logits, axis=-1)
        nats = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        masks = (at < length) & (tokens == self.mask)
        total, count = seen.nats + jnp.sum(jnp.where(masks, nats, 0.0)), seen.count + jnp.sum(masks)
        return logits, Watched(cache=cache, canvas=canvas, nats=total, count=count)
