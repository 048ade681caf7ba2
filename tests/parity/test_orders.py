"""Which positions public samplers commit, step by step: LLaDA's, Fast-dLLM's and Dream's stored runs at temperature 0.

Each stored canvas goes through the stored random network, rebuilt here, and one step of our `Confidence`. The canvas
after it must be the next stored one: the same positions, the same tokens. Fast-dLLM's threshold on Dream is not
replayed: one of its steps commits the second most probable position, where margin and entropy fit worse elsewhere.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import parity

from diffusion_lm.samplers.base import Canvas
from diffusion_lm.samplers.confidence import Confidence
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import FixedCount, Threshold

NO_EOS, MANY_STEPS = -1, 10_000
LLADA_NAMES = {  # LLaDA's -> Dream's, which are Qwen2's
    "transformer.wte": "embed_tokens", "transformer.ln_f": "norm", "transformer.blocks": "layers",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "attn_out": "o_proj",
    "ff_proj": "gate_proj", "up_proj": "up_proj", "ff_out": "down_proj",
}  # fmt: skip


class Peer:
    """A stored network of LLaDA or Dream: config, arrays, and its forward pass in float64 NumPy."""

    def __init__(self, family: str):
        self.stored, config = parity.arrays(family), parity.config(family)
        llada = config["model_type"] == "llada"
        self.mask = config["mask_token_id"]
        self.heads = config["n_heads"] if llada else config["num_attention_heads"]
        self.eps, self.theta = config["rms_norm_eps"], config["rope_theta"]
        self.layers = config["n_layers"] if llada else config["num_hidden_layers"]
        self.weights = {}
        for name, array in parity.weights(family).items():
            name = "lm_head.weight" if name == "model.transformer.ff_out.weight" else name.removeprefix("model.")
            for theirs, ours in LLADA_NAMES.items() if llada else ():
                name = name.replace(theirs, ours)
            self.weights[name.replace("self_attn.", "").replace("mlp.", "")] = array.astype(np.float64)

    def logits(self, tokens, valid=None):
        """float64 [B, L, V]; valid bool [B, L] is False where a row is padded on the left."""
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        positions = np.where(valid, np.cumsum(valid, axis=1) - 1, 1)
        x = self.weights["embed_tokens.weight"][tokens]
        for i in range(self.layers):
            at = f"layers.{i}"
            h = self._normed(f"{at}.input_layernorm", x)
            q, k, v = (self._linear(f"{at}.{part}_proj", h) for part in "qkv")
            width = q.shape[-1] // self.heads
            q, k, v = (
                self._split_heads(q, width, positions),
                self._split_heads(k, width, positions),
                self._split_heads(v, width),
            )
            scores = np.where(valid[:, None, None], q @ k.swapaxes(2, 3) / np.sqrt(width), -1e9)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            attended = (weights / weights.sum(axis=-1, keepdims=True)) @ v
            x = x + self._linear(f"{at}.o_proj", attended.swapaxes(1, 2).reshape(*x.shape[:2], -1))
            h = self._normed(f"{at}.post_attention_layernorm", x)
            gate = self._linear(f"{at}.gate_proj", h)
            x = x + self._linear(f"{at}.down_proj", gate / (1 + np.exp(-gate)) * self._linear(f"{at}.up_proj", h))
        return self._linear("lm_head", self._normed("norm", x))

    def _linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def _normed(self, name, x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weights[f"{name}.weight"]

    def _split_heads(self, x, width, positions=None):
        """[B, L, H D] -> [B, heads, L, D], rotated by position; each key-value head serves a group of query heads."""
        x = x.reshape(*x.shape[:2], -1, width)
        if positions is not None:
            half = width // 2
            angle = positions[:, :, None, None] / self.theta ** (np.arange(half) / half)
            cos, sin = (np.concatenate([f(angle)] * 2, axis=-1) for f in (np.cos, np.sin))
            x = x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin
        return np.repeat(x, self.heads // x.shape[2], axis=2).swapaxes(1, 2)

    def canvases(self, run):
        """int32 [calls + 1, B, L]: the tokens before each call, and those returned."""
        return np.concatenate([self.stored[f"{run}/x_before_forward"], self.stored[f"{run}/final"][None]])

    @functools.cached_property
    def prompt_length(self):
        return self.stored["sampler/prompt_b1"].shape[1]


@pytest.fixture(scope="module")
def llada():
    return Peer("llada")


@pytest.fixture(scope="module")
def dream():
    return Peer("dream")


def shifted(logits):
    """Dream's logits at a position predict the next one."""
    return np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


def after_step(sampler, logits, tokens, undecided, step):
    """The tokens after one step that follows `step` others."""
    tokens, undecided = jnp.asarray(tokens), jnp.asarray(undecided)
    canvas = Canvas(
        tokens=tokens,
        undecided=undecided,
        fixed=~undecided,
        confidence=jnp.zeros(tokens.shape),
        keys=jax.random.split(jax.random.key(0), len(tokens)),
        step=jnp.array(step, jnp.int32),
    )
    return np.asarray(sampler.update(canvas, logits).tokens)


def check_step(sampler, logits, tokens, undecided, step, after):
    """One step gives the stored canvas. Only where it doesn't may two choices be a tie within float32's rounding:
    then logits that differ by about 1e-5 give it."""
    logits = jnp.asarray(logits, jnp.float32)
    ours = after_step(sampler, logits, tokens, undecided, step)
    for seed in range(32) if (ours != after).any() else ():
        noise = 1e-5 * jax.random.normal(jax.random.key(seed), logits.shape)
        if (after_step(sampler, logits + noise, tokens, undecided, step) == after).all():
            return
    np.testing.assert_array_equal(ours, after)


def test_reference_networks_reproduce_stored_logits(llada, dream):
    logits = llada.logits(llada.stored["forward/input_ids"])
    np.testing.assert_allclose(logits, llada.stored["forward/logits"], atol=2e-4)
    logits = dream.logits(dream.stored["forward/input_ids"])
    np.testing.assert_allclose(logits, dream.stored["forward/logits_unshifted"], atol=2e-4)
    np.testing.assert_allclose(shifted(logits), dream.stored["forward/logits_shifted"], atol=2e-4)
    valid = dream.stored["padded/attention_mask"] == 1
    logits = dream.logits(dream.stored["forward/input_ids"], valid)
    np.testing.assert_allclose(logits[valid], dream.stored["padded/logits_unshifted"][valid], atol=2e-4)


def check_blocks(peer, run, sampler) -> int:
    """Replays a run in blocks from left to right; only the first block with a mask in it is undecided.

    Returns:
        The most steps that a block took.
    """
    block, most, begun, step = int(run["block"]), 0, None, 0
    for now, after in itertools.pairwise(peer.canvases(run[0])):
        masked = now == peer.mask
        first = int(np.flatnonzero(masked.any(axis=0))[0])
        start = first - (first - peer.prompt_length) % block
        begun, step = start, step + 1 if begun == start else 0
        here = (np.arange(now.shape[1]) >= start) & (np.arange(now.shape[1]) < start + block)
        check_step(sampler, peer.logits(now), now, masked & here, step, after)
        most = max(most, step + 1)
    return most


def fixed_count(peer, run, score="probability") -> tuple[Confidence, int]:
    """The sampler of a run with evenly many tokens a step, and its steps a block."""
    answer = peer.stored[f"{run[0]}/final"].shape[1] - peer.prompt_length
    steps = int(run["steps"]) * int(run["block"]) // answer
    pace = FixedCount(score=score)
    return Confidence(denoising_steps=steps, eos=NO_EOS, sampling=SamplingParams(temperature=0.0), schedule=pace), steps


def runs_of(parameters):
    return [match for parameter in parameters for match in parameter.values]


def threshold(probability) -> Confidence:
    pace = Threshold(threshold=probability)
    return Confidence(denoising_steps=MANY_STEPS, eos=NO_EOS, sampling=SamplingParams(temperature=0.0), schedule=pace)


FIXED_COUNT_RUNS = parity.found(
    "llada", r"sampler/(llada(_batch\d+)?|fastdllm_generate)_b(?P<block>\d+)_s(?P<steps>\d+)(_uneven)?"
)
THRESHOLD_RUNS = parity.found("llada", r"sampler/fastdllm_generate_b(?P<block>\d+)_thr(?P<threshold>[\d.]+)")


@pytest.mark.parametrize("run", FIXED_COUNT_RUNS)
def test_fixed_count(llada, run):
    """LLaDA hands out what doesn't divide evenly beforehand, one more token to each of the first steps.

    Ours commits what is left over the steps left, rounded up, which comes to the same.
    """
    sampler, steps = fixed_count(llada, run)
    assert check_blocks(llada, run, sampler) == steps


@pytest.mark.parametrize("run", THRESHOLD_RUNS)
def test_threshold(llada, run):
    """Theirs commits a probability at the threshold too, ours only above it: none lies there."""
    check_blocks(llada, run, threshold(float(run["threshold"])))


def replays(peer, run, sampler) -> bool:
    try:
        check_blocks(peer, run, sampler)
    except AssertionError:
        return False
    return True


def test_another_score_or_threshold_does_not_replay(llada):
    """The replays above notice a wrong rule: most runs need their own score, one at least its own threshold."""
    by_margin = [replays(llada, run, fixed_count(llada, run, score="margin")[0]) for run in runs_of(FIXED_COUNT_RUNS)]
    assert sum(by_margin) < len(by_margin) / 2
    assert not all(replays(llada, run, threshold(0.5)) for run in runs_of(THRESHOLD_RUNS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamSchedule:
    """Dream's count: of n masks n (1 - s / t), rounded down, on a grid from 1 to 0.001; all in the last step."""

    num_steps: int
    step: int
    score: str

    def count(self, scores, num_undecided, steps_left):
        times = np.linspace(1.0, 1e-3, self.num_steps + 1)
        share = 1.0 if self.step + 1 == self.num_steps else 1 - times[self.step + 1] / times[self.step]
        return jnp.floor(num_undecided * share).astype(jnp.int32)


DREAM_SCORES = {"entropy": "entropy", "maskgit_plus": "probability", "topk_margin": "margin"}


@pytest.mark.parametrize(
    "run",
    parity.found(
        "dream",
        rf"sampler/dream_(?P<alg>{'|'.join(DREAM_SCORES)})(?P<padded>_batch\d+_leftpad)?_s(?P<steps>\d+)",
    ),
)
def test_each_score_of_dream(dream, run):
    """Dream's count is not ours: rounded down on a grid that ends above 0, it leaves more to the last step.

    24 masks in 12 steps go by 1, 2, .., 2, 3, ours by 2; in 24 steps the first commits none, ours always one. Given as
    many, the same positions and tokens are committed.
    """
    canvases, num_steps, prompt = dream.canvases(run[0]), int(run["steps"]), dream.prompt_length
    valid = np.ones(canvases[0].shape, bool)
    if run["padded"]:
        valid[:, :prompt] = dream.stored[f"sampler/prompt_b{len(valid)}_attention_mask"] == 1
    assert len(canvases) == num_steps + 1
    for step, (now, after) in enumerate(itertools.pairwise(canvases)):
        masked = now == dream.mask
        pace = DreamSchedule(num_steps=num_steps, step=step, score=DREAM_SCORES[run["alg"]])
        if not np.asarray(pace.count(None, masked.sum(axis=1), None)).any():  # a step of ours commits at least one
            np.testing.assert_array_equal(now, after)
            continue
        sampler = Confidence(
            denoising_steps=MANY_STEPS, eos=NO_EOS, sampling=SamplingParams(temperature=0.0), schedule=pace
        )
        check_step(sampler, shifted(dream.logits(now, valid)), now, masked, 0, after)
