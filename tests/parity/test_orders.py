"""Which positions public samplers commit, pass by pass: LLaDA's, Fast-dLLM's and Dream's stored runs, at temperature 0.

Each stored canvas goes through their stored random network, rebuilt here, and one step of our `Confidence`; the canvas
after it must be the next stored one: the same positions, the same tokens. No stored call has two likeliest tokens
closer than 1e-4, so none of a run's passes is left out. Fast-dLLM's threshold on Dream is not replayed: one of its 24
passes commits the second surest by probability, where margin and entropy fit worse elsewhere.
"""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.samplers.base import Canvas
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import FixedCount, Threshold

NEVER, LONG, PROMPT = -1, 10_000, 12
LLADA_NAMES = {  # theirs -> Dream's, which are Qwen2's
    "transformer.wte": "embed_tokens", "transformer.ln_f": "norm", "transformer.blocks": "layers",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "attn_out": "o_proj",
    "ff_proj": "gate_proj", "up_proj": "up_proj", "ff_out": "down_proj",
}  # fmt: skip


class Peer:
    """A stored network: config, arrays, and logits [B, L, V] of tokens [B, L]."""

    def __init__(self, folder):
        safetensors = pytest.importorskip("safetensors.numpy")
        if not (folder / "io.npz").is_file():
            pytest.skip(f"no stored runs: {folder}/io.npz is absent")
        with np.load(folder / "io.npz") as arrays:
            self.stored = dict(arrays)
        config = json.loads((folder / "config.json").read_text())
        llada = config["model_type"] == "llada"
        self.mask = config["mask_token_id"]
        self.heads = config["n_heads"] if llada else config["num_attention_heads"]
        self.eps, self.theta = config["rms_norm_eps"], config["rope_theta"]
        self.layers = config["n_layers"] if llada else config["num_hidden_layers"]
        self.weights = {}
        for name, array in safetensors.load_file(folder / "model.safetensors").items():
            name = "lm_head.weight" if name == "model.transformer.ff_out.weight" else name.removeprefix("model.")
            for theirs, ours in LLADA_NAMES.items() if llada else ():
                name = name.replace(theirs, ours)
            self.weights[name.replace("self_attn.", "").replace("mlp.", "")] = jnp.asarray(array)
        self.logits = jax.jit(self._logits)

    def _linear(self, name, x):
        y = jnp.einsum("bli,oi->blo", x, self.weights[f"{name}.weight"], precision="highest")
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias[None, None]

    def _normed(self, name, x):
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weights[f"{name}.weight"][None, None]

    def _headed(self, x, positions=None):
        """[B, L, H D] -> [B, L, H, D], turned by position; keys and values of two heads are read by four."""
        x = x.reshape(*x.shape[:2], -1, 64 // self.heads)
        if positions is not None:
            half = x.shape[-1] // 2
            angle = positions[:, :, None, None] / self.theta ** (jnp.arange(half) / half)[None, None, None]
            cos, sin = (jnp.concatenate([f(angle)] * 2, axis=-1) for f in (jnp.cos, jnp.sin))
            x = x * cos + jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin
        return jnp.repeat(x, self.heads // x.shape[2], axis=2)

    def _logits(self, tokens, seen):
        """seen bool [B, L]: False where a row is padded on the left."""
        positions = jnp.where(seen, jnp.cumsum(seen, axis=1) - 1, 1)
        x = self.weights["embed_tokens.weight"][tokens]
        for i in range(self.layers):
            at = f"layers.{i}"
            h = self._normed(f"{at}.input_layernorm", x)
            q, k, v = (self._linear(f"{at}.{part}_proj", h) for part in "qkv")
            q, k, v = self._headed(q, positions), self._headed(k, positions), self._headed(v)
            scores = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") / np.sqrt(q.shape[-1])
            scores = jnp.where(seen[:, None, None], scores, -1e9)
            read = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores, axis=-1), v, precision="highest")
            x = x + self._linear(f"{at}.o_proj", read.reshape(x.shape))
            h = self._normed(f"{at}.post_attention_layernorm", x)
            gated = jax.nn.silu(self._linear(f"{at}.gate_proj", h)) * self._linear(f"{at}.up_proj", h)
            x = x + self._linear(f"{at}.down_proj", gated)
        return self._linear("lm_head", self._normed("norm", x))

    def canvases(self, run):
        """int32 [calls + 1, B, L]: before each call, and what is returned."""
        assert (self.stored[f"sampler/{run}/min_top2_logit_gap"] > 1e-4).all()
        before = self.stored[f"sampler/{run}/x_before_forward"]
        return np.concatenate([before, self.stored[f"sampler/{run}/final"][None]])


@pytest.fixture(scope="module")
def llada(shared):
    return Peer(shared / "parity/llada")


@pytest.fixture(scope="module")
def dream(shared):
    return Peer(shared / "parity/dream")


def seen(tokens):
    return jnp.ones(tokens.shape, bool)


def shifted(logits):
    """Dream's logits say of the next position."""
    return jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


def stepped(sampler, logits, tokens, opened, passes):
    """The tokens after one step, of `passes` that were made before."""
    tokens, opened = jnp.asarray(tokens), jnp.asarray(opened)
    canvas = Canvas(
        tokens=tokens,
        undecided=opened,
        context_mask=~opened,
        confidence=jnp.zeros(tokens.shape),
        keys=jax.random.split(jax.random.key(0), len(tokens)),
        passes=jnp.array(passes, jnp.int32),
    )
    return np.asarray(sampler.step(lambda tokens, t: logits, canvas).tokens)


def test_the_networks_are_the_stored_ones(llada, dream):
    tokens = jnp.asarray(llada.stored["forward/input_ids"])
    np.testing.assert_allclose(llada.logits(tokens, seen(tokens)), llada.stored["forward/logits"], atol=2e-4)
    tokens = jnp.asarray(dream.stored["forward/input_ids"])
    said, padded = dream.logits(tokens, seen(tokens)), jnp.asarray(dream.stored["padded/attention_mask"] == 1)
    np.testing.assert_allclose(said, dream.stored["forward/logits_unshifted"], atol=2e-4)
    np.testing.assert_allclose(shifted(said), dream.stored["forward/logits_shifted"], atol=2e-4)
    said = np.asarray(dream.logits(tokens, padded))[padded]
    np.testing.assert_allclose(said, dream.stored["padded/logits_unshifted"][padded], atol=2e-4)


EVEN = {  # run: block, passes a block
    "llada_b32_s32": (32, 32),
    "llada_b8_s16": (8, 4),
    "llada_b8_s12_uneven": (8, 3),
    "llada_batch2_b16_s8": (16, 4),
    "fastdllm_generate_b8_s16": (8, 4),
    "fastdllm_generate_b16_s8": (16, 4),
}
FIXED = {"fastdllm_generate_b16_thr0.3": (16, 0.3), "fastdllm_generate_b8_thr0.9": (8, 0.9)}


def blocks_replayed(peer, run, block, sampler) -> int:
    """Passes that replay; only the first block with a mask in it is open."""
    canvases, began, calls = peer.canvases(run), None, 0
    for now, after in itertools.pairwise(canvases):
        masked = now == peer.mask
        start = PROMPT + (int(np.flatnonzero(masked.any(axis=0))[0]) - PROMPT) // block * block
        began, calls = start, calls + 1 if began == start else 0
        here = (np.arange(now.shape[1]) >= start) & (np.arange(now.shape[1]) < start + block)
        logits = peer.logits(jnp.asarray(now), seen(now))
        np.testing.assert_array_equal(stepped(sampler, logits, now, masked & here, calls), after)
    return len(canvases) - 1


@pytest.mark.parametrize("run", EVEN)
def test_evenly_many_a_pass(llada, run):
    """LLaDA hands out what doesn't divide evenly before it begins, one more to each of the first passes; to commit
    what is left over the passes left, rounded up, as we do, comes to the same."""
    block, passes = EVEN[run]
    sampler = Confidence(passes=passes, eos=NEVER, draw=SamplingParams(temperature=0.0), pace=FixedCount())
    assert blocks_replayed(llada, run, block, sampler) == 32 // block * passes


@pytest.mark.parametrize("run", FIXED)
def test_all_above_a_threshold(llada, run):
    """Theirs takes a probability at the threshold too, ours only above it: none lies there."""
    block, least = FIXED[run]
    sampler = Confidence(passes=LONG, eos=NEVER, draw=SamplingParams(temperature=0.0), pace=Threshold(least=least))
    assert blocks_replayed(llada, run, block, sampler) == (13 if least < 0.5 else 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamsPace:
    """Dream's count: of n masks n (1 - s / t), rounded down, on a grid from 1 to 0.001; all in the last pass."""

    passes: int
    made: int
    measure: str

    def count(self, sure, num_undecided, left):
        times = np.linspace(1.0, 1e-3, self.passes + 1)
        share = 1.0 if self.made + 1 == self.passes else 1 - times[self.made + 1] / times[self.made]
        return jnp.floor(num_undecided * share).astype(jnp.int32)


DREAM = {
    "dream_entropy_s12": "entropy",
    "dream_entropy_s24": "entropy",
    "dream_maskgit_plus_s12": "probability",
    "dream_maskgit_plus_batch2_leftpad_s12": "probability",
    "dream_topk_margin_s12": "margin",
}


@pytest.mark.parametrize("run", DREAM)
def test_by_each_measure(dream, run):
    """Dream's count is not ours: rounded down on a grid that ends above 0, it leaves the last pass more (24 masks in 12
    passes go by 1, 2, .., 2, 3, ours by 2; in 24 passes the first commits none, ours always one). Given as many, the
    same positions and tokens go first."""
    canvases, counts = dream.canvases(run), []
    padding = dream.stored["sampler/prompt_b2_attention_mask"] if "leftpad" in run else np.ones((1, PROMPT), int)
    seen = jnp.asarray(np.pad(padding, ((0, 0), (0, 24)), constant_values=1) == 1)
    for made, (now, after) in enumerate(itertools.pairwise(canvases)):
        pace = DreamsPace(passes=len(canvases) - 1, made=made, measure=DREAM[run])
        sampler = Confidence(passes=LONG, eos=NEVER, draw=SamplingParams(temperature=0.0), pace=pace)
        logits = shifted(dream.logits(jnp.asarray(now), seen))
        counts.append(int((now == dream.mask)[0].sum() - (after == dream.mask)[0].sum()))
        if counts[-1]:
            np.testing.assert_array_equal(stepped(sampler, logits, now, now == dream.mask, 0), after)
    assert counts == ([1, *[2] * 10, 3] if run.endswith("s12") else [0, *[1] * 22, 2])


def test_another_order_does_not_replay(llada):
    by_margin = Confidence(passes=4, eos=NEVER, draw=SamplingParams(temperature=0.0), pace=FixedCount(measure="margin"))
    strict = Confidence(passes=LONG, eos=NEVER, draw=SamplingParams(temperature=0.0), pace=Threshold(least=0.5))
    for run, sampler in (("llada_b8_s16", by_margin), ("fastdllm_generate_b16_thr0.3", strict)):
        with pytest.raises(AssertionError):
            blocks_replayed(llada, run, 8 if "b8" in run else 16, sampler)
