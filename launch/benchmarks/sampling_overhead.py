"""Sampler overhead (the share of generation time outside forward passes) and what the exact cache saves: a suite of
launch.benchmark."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.block_diffusion import BlockDiffusion
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.drafters import Drafter, MaskedDraft, PromptLookup, TiDARDraft
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.speculative import Speculative
from launch.benchmarks import jax_cases, timing, torch_cases, turns
from launch.benchmarks.timing import Row
from launch.benchmarks.turns import Peer

SIZES = jax_cases.Sizes(vocab=32_000, width=512, layers=12, heads=8, mlp=1408)
PROMPT, NEW, STEPS = 128, 256, 12
CANVAS_LENGTHS = (32, 64, 256)
TORCH_CANVAS_LENGTHS = (32, 64)
SPECIAL = {"mask": SIZES.vocab, "eos": SIZES.vocab + 1}  # an eos that is no token: all NEW tokens are generated
DRAFTED = 96  # tokens generated where drafts are timed


def sampling_overhead() -> list[Row]:
    """All rows, on a network of 71M random parameters."""
    network = jax_cases.random_network(SIZES)
    overheads = [_overhead(network, width) for width in CANVAS_LENGTHS]
    return [*overheads, *[_uncached(network, width) for width in TORCH_CANVAS_LENGTHS], *_rounds(network)]


def _generation(network: BoundModel, width: int) -> Callable:
    sampler = BlockDiffusion(
        sampler=Confidence(denoising_steps=STEPS, eos=SPECIAL["eos"]), canvas_length=width, **SPECIAL
    )
    return jax_cases.generation(network.for_sampling(rows=width), sampler, prompt=PROMPT, new=NEW)


def _overhead(network: BoundModel, width: int) -> Row:
    """The share of generation time outside forward passes."""
    both = {"whole": _generation(network, width), "passes": _passes_alone(network.for_sampling(rows=width), width)}
    timings = timing.alternate(both, repeats=5)
    ratio = timing.times_faster(timings["passes"], timings["whole"])
    return Row(
        name=f"sampler overhead, canvas {width}, {STEPS} steps",
        value=100 * (1 - 1 / ratio),
        unit="% of the time",
        target="<= 5",
        cpu_s=timings["whole"].cpu,
        reference_cpu_s=timings["passes"].cpu,
        note=f"71M, batch 1; reference: the same {NEW // width * (STEPS + 1)} passes, and the largest logit of each",
    )


def _passes_alone(network: BoundModel, width: int) -> Callable[[], jax.Array]:
    """The forward passes of such a generation and nothing else: the prompt's, the canvases', the commits'."""
    tokens = jax.random.randint(jax.random.key(1), (1, PROMPT), 0, SIZES.vocab)

    @functools.partial(jax.jit, donate_argnums=1)
    def passes(network, cache):
        _, cache = network.extend(cache, tokens, jnp.full(1, PROMPT, jnp.int32), Causal())

        def one_pass(canvas, _):
            largest = jnp.max(network.denoise_canvas(cache_now[0], canvas, jnp.full(1, 0.5)))
            return jnp.where(largest > 1e30, canvas - 1, canvas), None  # never, but the compiler doesn't know that

        def one_canvas(carry, _):
            cache, canvas = carry
            cache_now[0] = cache
            canvas, _ = jax.lax.scan(one_pass, canvas, length=STEPS)
            _, cache = network.extend(cache, canvas, jnp.full(1, width, jnp.int32), Causal())
            return (cache, canvas), None

        cache_now = [cache]
        masks = jnp.full((1, width), SIZES.vocab, jnp.int32)
        return jax.lax.scan(one_canvas, (cache, masks), length=NEW // width)[0][1]

    return lambda: passes(network, network.empty_cache(1, PROMPT + NEW))


def _uncached(network: BoundModel, width: int) -> Row:
    """Compared with a loop that recomputes the whole text in every pass."""
    sizes = dataclasses.asdict(SIZES) | {"prompt": PROMPT, "new": NEW, "canvas": width, "passes": STEPS}
    peer = Peer(cases=f"{torch_cases.__name__}:recomputed", options=sizes, packages=("torch",))
    found = turns.take_turns({"PyTorch": peer}, 3, {"ours": _generation(network, width)})
    row = Row(
        name=f"canvas {width}, {STEPS} steps, against no cache",
        value=NEW / found.timings["ours"].wall,
        unit="tokens/s",
        target="ratio >= 4",
        cpu_s=found.timings["ours"].cpu,
        note="71M, batch 1; PyTorch: float32, no cache, logits of the canvas only",
    )
    return found.compared(row, "ours", "PyTorch", NEW)


def _rounds(network: BoundModel) -> list[Row]:
    """The cost of a speculative round in autoregressive steps, measured with drafts that are always rejected.

    A round of a trained network must accept that many tokens to break even, and 1.4 times as many to be 1.4 times as
    fast.
    """
    draw, network = SamplingParams(temperature=0), network.for_sampling(rows=1)
    drafters = {"lookup": PromptLookup(), "masked": MaskedDraft(mask=SIZES.vocab), "tidar": TiDARDraft()}
    samplers = {"plain": AutoregressiveSampler(sampling=draw, **SPECIAL)}
    samplers |= {
        name: Speculative(drafter=_Rejected(drafter), sampling=draw, **SPECIAL) for name, drafter in drafters.items()
    }
    cases = {name: jax_cases.generation(network, one, prompt=PROMPT, new=DRAFTED) for name, one in samplers.items()}
    timings = timing.alternate(cases, repeats=3)
    return [
        Row(
            name=f"speculative round, {name} drafts of {drafter.num_tokens}",
            value=1e3 * timings[name].wall / DRAFTED,
            unit="ms",
            reference=1e3 * timings["plain"].wall / DRAFTED,
            ratio=1 / timing.times_faster(timings["plain"], timings[name]),
            note=f"71M, batch 1: even at {timing.times_faster(timings['plain'], timings[name]):.2f} tokens a round",
        )
        for name, drafter in drafters.items()
    ]


@dataclasses.dataclass(frozen=True)
class _Rejected(Drafter):
    """A drafter that does its work, and whose drafts are always rejected."""

    drafter: Drafter

    @property
    def num_tokens(self) -> int:
        return self.drafter.num_tokens

    @property
    def num_passes(self) -> int:
        return self.drafter.num_passes

    @property
    def canvas_length(self) -> int:
        return self.drafter.canvas_length

    def __call__(self, model, cache, text, filled):
        guess = self.drafter(model, cache, text, filled)
        return jnp.where(guess >= 0, SIZES.vocab, guess)  # the mask, which is never sampled
