"""A leg of the suite "accelerator": generation by a network of 8B random parameters in bfloat16.

The bound of a pass is max(bytes of weights / bandwidth, operations / peak). A generation's is the sum over its passes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import AttentionPattern, BlockCausal, Causal, DraftAndVerify, Full
from diffusion_lm.models import flops
from diffusion_lm.models.base import Execution, Vocabulary
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.base import Prompt, TextSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.drafters import TiDARDraft
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.speculative import Speculative
from diffusion_lm.training.state import parameter_count
from launch.benchmarks.accelerator_cases import (
    Case,
    Measured,
    Sizes,
    gigabytes,
    in_turn,
    least_seconds,
    random_params,
    seconds_of,
    speed,
)


class Passes(NamedTuple):
    """`count` forward passes over `length` new positions a row, after about `past` positions of the cache; logits of
    `num_logits` of them, 0 for all."""

    count: int
    length: int
    attention: AttentionPattern
    past: int
    num_logits: int = 0


class Generation(NamedTuple):
    """What is generated: by which sampler, how many tokens a row, in which passes (of drafts: where none is accepted);
    `quantization` of `Execution`."""

    sampler: TextSampler
    new: int
    passes: tuple[Passes, ...]
    quantization: str = "none"


def sample(sizes: Sizes, left: Callable[[], float]) -> Iterator[Measured]:
    """Canvases, token by token, blocks, forked drafts and int8, greedily; tokens/s of all rows together."""
    del left
    abstract, kinds, found = abstract_network(sizes), generations(sizes), {}
    network = abstract.replace(params=random_params(abstract.params))
    one, *many = sizes.batches
    groups = [[(name, rows) for name in ("canvas", "token by token")] for rows in sizes.batches]
    groups += [[("forked drafts", one), ("blocks", one)], [("canvas, int8", rows) for rows in sizes.batches]]
    groups += [[("blocks", rows)] for rows in many]
    for group in groups:  # few at a time: tracing so many layers takes as long as compiling them
        cases = [
            Case(
                f"sample {name}, batch {rows}",
                functools.partial(compiled_generation, network, kinds[name], rows, sizes.prompt),
                functools.partial(_timed, network, kinds[name], rows, sizes),
            )
            for name, rows in group
        ]
        for (name, rows), row in zip(group, in_turn(cases), strict=True):
            found[name, rows] = row.pass_ms
            beside = {"canvas, int8": "canvas", "forked drafts": "token by token"}.get(name)
            if row.pass_ms and (other := found.get((beside, rows))):
                row = dataclasses.replace(row, note=f"{row.note}, {row.pass_ms / other:.2f} x one of {beside}")
            yield row


def abstract_network(sizes: Sizes) -> BoundModel:
    """The network with shapes for parameters."""
    vocabulary = Vocabulary(size=sizes.vocabulary, mask=sizes.vocabulary - 1)
    module = Transformer(sizes.network, vocabulary, Execution())

    def fresh(key):
        return BoundModel(module=module, params=nn.meta.unbox(init_params(module, key))).for_sampling()

    return jax.eval_shape(fresh, jax.random.key(0))


def generations(sizes: Sizes) -> dict[str, Generation]:
    """By name. No text ends early: the end of text is no token."""
    greedy, s = SamplingParams(temperature=0), sizes
    special = {"mask": s.vocabulary - 1, "eos": s.vocabulary + 1000}

    def canvases(width: int, steps: int, **options: Any) -> BlockDiffusion:
        confidence = Confidence(denoising_steps=steps, eos=special["eos"], sampling=greedy)
        return BlockDiffusion(sampler=confidence, canvas_length=width, **special, **options)

    def of_canvases(width: int, steps: int, clean: AttentionPattern) -> tuple[Passes, ...]:
        count, middle = s.canvas // width, s.prompt + (s.canvas - width) // 2
        prompt = Passes(1, s.prompt, clean, 0, num_logits=1)
        commits = Passes(count - 1, width, clean, middle, num_logits=1)  # nothing follows the last canvas
        return prompt, Passes(count * steps, width, Full(), middle), commits

    prompt, middle, blocks = Passes(1, s.prompt, Causal(), 0, num_logits=1), s.prompt + s.new // 2, BlockCausal(s.block)
    canvas = Generation(canvases(s.canvas, s.steps), s.canvas, of_canvases(s.canvas, s.steps, Causal()))
    one_by_one = AutoregressiveSampler(sampling=greedy, **special)
    forked = Speculative(drafter=TiDARDraft(num_tokens=s.draft), sampling=greedy, **special)
    round_ = DraftAndVerify(s.draft + 1, s.draft + 1)
    return {
        "canvas": canvas,
        "token by token": Generation(one_by_one, s.new, (prompt, Passes(s.new - 1, 1, Causal(), middle))),
        "forked drafts": Generation(forked, s.new, (prompt, Passes(s.new - 1, s.draft + 1, round_, middle))),
        "blocks": Generation(
            canvases(s.block, s.block_steps, clean=blocks, align=s.block), s.canvas,
            of_canvases(s.block, s.block_steps, blocks),
        ),
        "canvas, int8": canvas._replace(quantization="int8"),
    }  # fmt: skip


def compiled_generation(network: BoundModel, what: Generation, rows: int, prompt: int) -> Any:
    """(network, cache, prompt, keys) -> the generation; the cache is donated. The network may be abstract."""
    return lowered_generation(network, what, rows, prompt).compile()


def lowered_generation(network: BoundModel, what: Generation, rows: int, prompt: int) -> Any:
    """As `compiled_generation`, before it is compiled."""
    network = _quantized(network, what)

    def generate(network, cache, request, keys):
        return what.sampler.generate(network, cache, request, keys, max_new_tokens=what.new)

    shapes = jax.eval_shape(lambda: (_empty(network, what, rows, prompt), *_request(network, rows, prompt)))
    return jax.jit(generate, donate_argnums=1).lower(network, *shapes)


def _quantized(network: BoundModel, what: Generation) -> BoundModel:
    execution = dataclasses.replace(network.module.exec, quantization=what.quantization)
    return network.replace(module=network.module.clone(exec=execution))


def _empty(network: BoundModel, what: Generation, rows: int, prompt: int) -> Any:
    return network.empty_cache(rows, what.sampler.slots(prompt, what.new))


def _request(network: BoundModel, rows: int, prompt: int) -> tuple[Prompt, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (rows, prompt), 0, network.module.vocabulary.mask)
    request = Prompt(tokens=tokens, length=jnp.full(rows, prompt, jnp.int32))
    return request, jax.random.split(jax.random.key(2), rows)


def _timed(network: BoundModel, what: Generation, rows: int, sizes: Sizes, compiled: Any) -> Measured:
    network, nfe = _quantized(network, what), 0
    request, keys = _request(network, rows, sizes.prompt)
    empty = jax.jit(lambda: _empty(network, what, rows, sizes.prompt))  # one call a generation, not two a layer

    def generate():
        nonlocal nfe
        found = compiled(network, empty(), request, keys)
        nfe = found.nfe
        return found.tokens

    seconds, passes = seconds_of(generate, sizes.repeats), int(nfe)
    if isinstance(what.sampler, Speculative):  # random weights accept a draft now and then
        what = what._replace(passes=(what.passes[0], what.passes[1]._replace(count=passes - 1)))
    least, tokens = _least(network, what, rows), rows * what.new
    milliseconds = 1e3 * seconds / passes
    note = f"{parameter_count(network.params) / 1e9:.2f}B, {what.new} tokens a row in {passes} passes"
    more = {"gigabytes": gigabytes(compiled), "pass_ms": milliseconds}
    return speed(seconds, tokens, "tokens/s", least=least, note=f"{note}: {milliseconds:.2f} ms a pass", **more)


def _least(network: BoundModel, what: Generation, rows: int) -> float | None:
    """Seconds of the bound; None on a device without a known peak."""
    # Of the embedding's table a pass looks up a few rows.
    read = sum(a.size * a.dtype.itemsize for name, part in network.params.items() if name != "embedding"
               for a in jax.tree.leaves(part))  # fmt: skip
    total = 0.0
    for p in what.passes:
        operations = flops.of_pass(
            network.module, rows=rows, length=p.length, attention=p.attention, past=p.past, num_logits=p.num_logits
        )
        if (least := least_seconds(operations, read)) is None:
            return None
        total += p.count * least
    return total
