"""The families' own samplers: stored runs come out token for token, from our network under our preset, in float32.

A folder is loaded as any is, and `published` makes the text sampler from settings by the family's own names. It runs as
it is, but its loop is Python's, so that all runs share the few programs of the network's passes. (`tests/inference`
compiles some whole.) What the folders can't show is said beside each test.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from support import parity
from support.python_loops import generated, loops_in_python  # noqa: F401 (a fixture)
from support.sources import write_source

from diffusion_lm.convert.loading import load_source
from diffusion_lm.inference import presets, published
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.cache_policy import DualCache, PrefixCache
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.unmasking import FixedCount, Threshold

pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")
pytestmark = pytest.mark.usefixtures("loops_in_python")
GREEDY = {"temperature": 0.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(family, what its config.json says otherwise) -> the folder's model. No run ends: the end of text is the first
    id, which none holds."""

    @functools.cache
    def loaded(family, config=()):
        folder = tmp_path_factory.mktemp(family)
        ends = {} if family == "tiny_diffusion" else {"eos_token_id": 0}  # whose config.json has no such key
        write_source(folder, family, ends | dict(config))
        return load_source(folder, dtype="float32")

    return loaded


def written(model, prompt, length, **settings):
    """The new tokens [B, length], and the forward passes, by the preset with these settings."""
    made = published.preset(model, **settings)
    return generated(model, made.sampler, prompt, length, made.cfg_scale)


def answer(io, run, prompt):
    """What the family's own code wrote after the prompt."""
    return io[f"{run}/final"][:, np.asarray(prompt).shape[1] :]


def prompt_of(io, run):
    """[B, P] of a run of LLaDA or Dream."""
    return io["sampler/prompt"] if "sampler/prompt" in io else io[f"sampler/prompt_b{len(io[f'{run}/final'])}"]


# LLaDA and LLaDA-MoE: their own generate, and Fast-dLLM's of the same loop with a threshold

LLADA = (
    r"sampler/(llada|fastdllm_generate)(_batch\d+|_cfg(?P<cfg>[\d.]+))?"
    r"_b(?P<block>\d+)_(s(?P<steps>\d+)|thr(?P<thr>[\d.]+))(_uneven)?"
)
CACHES = {"prefix": PrefixCache, "dual": DualCache}


def with_padding_rows(load, family):
    """The random network also emits rows that only pad the table, so that they count as tokens here."""
    config = parity.config(family)
    return load(family, (("vocab_size", config.get("embedding_size", config["vocab_size"])),))


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("family", "run"),
    [
        pytest.param(family, *found.values, id=f"{family}-{found.id}", marks=found.marks)
        for family in ("llada", "lladamoe")
        for found in parity.found(family, LLADA)
    ],
)
def test_llada(load, family, run):
    io, settings = parity.arrays(family), {"block_length": int(run["block"])}
    settings |= {"threshold": float(run["thr"])} if run["thr"] else {"denoising_steps": int(run["steps"])}
    settings |= {"cfg_scale": float(run["cfg"])} if run["cfg"] else {}
    prompt = prompt_of(io, run[0])
    expected = answer(io, run[0], prompt)
    tokens, passes = written(with_padding_rows(load, family), prompt, expected.shape[1], **settings)
    np.testing.assert_array_equal(tokens, expected)
    assert passes == io[f"{run[0]}/nfe"]


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "run",
    parity.found(
        "llada",
        r"sampler/fastdllm_generate_with_(?P<cache>prefix|dual)_cache_b(?P<block>\d+)_(s(?P<steps>\d+)|thr(?P<thr>[\d.]+))",
    ),
)
def test_fast_dllms_caches_on_llada(load, run):
    """Our approximate caches are theirs: which keys and values are stale, and in which blocks."""
    io, model = parity.arrays("llada"), with_padding_rows(load, "llada")
    prompt = prompt_of(io, run[0])
    expected = answer(io, run[0], prompt)
    length = prompt.shape[1] + expected.shape[1]
    sampler = presets.approximate_cache(
        model,
        policy=CACHES[run["cache"]](block_size=int(run["block"])),
        canvas_length=length,
        denoising_steps=int(run["steps"] or length),
        sampling=SamplingParams(temperature=0.0),
        schedule=Threshold(threshold=float(run["thr"])) if run["thr"] else FixedCount(),
    )
    tokens, passes = generated(model, sampler, prompt, expected.shape[1])
    np.testing.assert_array_equal(tokens, expected)
    assert passes == io[f"{run[0]}/nfe"]


# Dream: the orders that seek likely text, and `origin` with its stored draws


def dream_rows(io, run):
    """Prompts without their padding: ours is on the right."""
    prompt = prompt_of(io, run)
    if "leftpad" not in run:
        return prompt, list(prompt)
    real = io[f"sampler/prompt_b{len(prompt)}_attention_mask"] == 1
    return prompt, [row[here] for row, here in zip(prompt, real, strict=True)]


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "run", parity.found("dream", r"sampler/dream_(?P<alg>entropy|maskgit_plus|topk_margin)\w*_s(?P<steps>\d+)")
)
def test_dream(load, run):
    io = parity.arrays("dream")
    prompt, rows = dream_rows(io, run[0])
    expected = answer(io, run[0], prompt)
    settings = {"alg": run["alg"], "denoising_steps": int(run["steps"])}
    tokens, passes = written(load("dream"), rows, expected.shape[1], **settings, **GREEDY)
    np.testing.assert_array_equal(tokens, expected)
    assert passes == io[f"{run[0]}/nfe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredDraws(Absorbing):
    """Masks that are revealed by uniform draws of the masked positions in order, one row a step."""

    draws: tuple[tuple[float, ...], ...]
    end: float

    def reverse(self, keys, logits, xt, t, s):
        step = jnp.round((1 - t) / (1 - self.end) * len(self.draws)).astype(jnp.int32)
        masked = xt == self.mask
        rank = jnp.cumsum(masked, axis=1) - 1
        u = jnp.take_along_axis(jnp.asarray(self.draws)[step], rank, axis=1)
        return jnp.where(masked & (u < self.reveal_probability(t, s)[:, None]), jnp.argmax(logits, axis=-1), xt)


@pytest.mark.parametrize("run", parity.found("dream", r"sampler/dream_origin_s(?P<steps>\d+)"))
def test_dream_origin_by_its_stored_draws(load, run):
    io, model = parity.arrays("dream"), load("dream")
    prompt = prompt_of(io, run[0])
    expected = answer(io, run[0], prompt)
    sampler = published.preset(model, alg="origin", denoising_steps=int(run["steps"]), **GREEDY).sampler
    draws = np.nan_to_num(io[f"{run[0]}/rand_over_masked_positions"], nan=2.0)
    process = StoredDraws(mask=model.process.mask, draws=tuple(map(tuple, draws.tolist())), end=sampler.sampler.end)
    sampler = dataclasses.replace(sampler, sampler=dataclasses.replace(sampler.sampler, process=process))
    tokens, passes = generated(model, sampler, prompt, expected.shape[1])
    np.testing.assert_array_equal(tokens, expected)
    assert passes == io[f"{run[0]}/nfe"]


# SDAR

SDAR = r"sampler/(?P<strategy>low_confidence_static|low_confidence_dynamic|sequential)_b(?P<block>\d+)_s(?P<steps>\d+)"
SDAR_THRESHOLD = 0.25  # not among the folder's numbers: the steps of its runs put it between 0.242 and 0.263


@pytest.mark.cases(4)
@pytest.mark.parametrize("run", parity.found("sdar", SDAR))
def test_sdar(load, run):
    """Greedy with confidences at temperature 1, as the folder was made. The last block isn't written to our cache.

    With fewer masks left than a step commits, its topk picks the rest among tokens that stand, the prompt's too, whose
    scores are all minus infinity. Which ones is up to how topk sorts equals: of a block of 4 the third, whichever three
    stand, and of one of 8 the seventh of seven. No option of ours could say that, so that these runs are skipped.
    """
    io, model = parity.arrays("sdar"), load("sdar")
    if overwrites(io[f"{run[0]}/forward_input_padded-1"][:, 0], model.tokenizer.mask):
        pytest.skip("with fewer masks left than a step commits, its topk overwrote tokens that stand: ours never does")
    prompt = io["sampler/prompt"]
    expected = answer(io, run[0], prompt)
    settings = {"canvas_length": int(run["block"]), "denoising_steps": int(run["steps"])}
    settings |= {"remasking_strategy": run["strategy"], "confidence_threshold": SDAR_THRESHOLD}
    tokens, passes = written(model, prompt, expected.shape[1], **settings, **GREEDY)
    np.testing.assert_array_equal(tokens, expected)
    assert passes == io[f"{run[0]}/nfe"] - 1


def overwrites(calls, mask):
    """Whether a block with masks in it [calls, K] changes a token that stands before the next call."""
    return any(
        ((now != mask) & (now != after)).any() for now, after in itertools.pairwise(calls) if (now == mask).any()
    )


# LLaDA2.0 and LLaDA2.1

EDITING = 0.5  # LLaDA2.1's; the steps of all four runs put it between 0.499 and 0.510
LLADA2 = r"sampler/b(?P<block>\d+)_s(?P<steps>\d+)(_thr(?P<thr>[\d.]+))?"


def check_llada2(load, family, run, **settings):
    io = parity.arrays(family)
    expected = io[f"{run[0]}/final_generated"]
    settings |= {"canvas_length": int(run["block"])} | ({"threshold": float(run["thr"])} if run["thr"] else {})
    tokens, _ = written(load(family), io["sampler/prompt"], expected.shape[1], **settings)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.cases(2)
@pytest.mark.parametrize("run", parity.found("llada2", LLADA2))
def test_llada2(load, run):
    check_llada2(load, "llada2", run, denoising_steps=int(run["steps"]))


@pytest.mark.cases(2)
@pytest.mark.parametrize("run", parity.found("llada21", LLADA2))
def test_llada21(load, run):
    """Names don't say how many steps without masks a block may have: as many as the longest of all runs."""
    calls = [array for name, array in parity.arrays("llada21").items() if name.endswith("forward_input_padded-1")]
    most = max(max_without_masks(each, load("llada21").tokenizer.mask) for each in calls)
    check_llada2(load, "llada21", run, editing_threshold=EDITING, max_post_steps=most)


def max_without_masks(calls, mask):
    """Of all blocks, the most calls that begin without a mask; a block's calls have one length."""
    texts = itertools.groupby((call[call >= 0] for call in calls), key=len)
    return max(sum(not (text == mask).any() for text in block) for _, block in texts)


# Fast-dLLM v2


@pytest.mark.cases(2)
@pytest.mark.parametrize("run", parity.found("fastdllm_v2", r"sampler/p\w+_thr(?P<thr>[\d.]+)"))
def test_fastdllm_v2(load, run):
    """Sub-blocks are as narrow as the run's steps allow: names don't say. The last token is of a block of its own.

    With its block cache a pass computes all of a block only while the sub-block's first token is masked, else the
    sub-block alone, over the exact cache of the text before and stale keys of the rest of its block. Ours computes
    parts of a canvas only where no text is cached before it (`BlockDiffusion.approximate_cache`): that run is skipped.
    """
    if "blockcache" in run[0]:
        pytest.skip("its block cache attends to stale keys inside a block, which we don't have over an exact cache")
    io, model = parity.arrays("fastdllm_v2"), load("fastdllm_v2")
    prompt, expected = io[f"{run[0]}/prompt"], answer(io, run[0], io[f"{run[0]}/prompt"])
    settings = {
        "threshold": float(run["thr"]),
        "small_block_size": narrowest(io[f"{run[0]}/forward_input_padded-1"], model),
    }
    tokens, _ = written(model, prompt, expected.shape[1], **settings)
    np.testing.assert_array_equal(tokens, expected)


def narrowest(calls, model):
    """The least width of sub-blocks in which every step commits in the first one with a mask."""
    size, mask = model.config.objective.layout.size, model.tokenizer.mask
    for width in (w for w in range(1, size + 1) if size % w == 0):
        for now, after in zip(calls[:, :size], calls[1:, :size], strict=False):
            new = np.flatnonzero((now == mask) & (after != mask))
            same_block = (after == now)[now != mask].all()
            if same_block and len(new) and (new // width != np.argmax(now == mask) // width).any():
                break
        else:
            return width
    raise AssertionError("no width of sub-blocks explains this run")


# tiny-diffusion


@pytest.mark.parametrize(
    "run", parity.found("tiny_diffusion", r"sampler/(topk(?P<k>\d+)|confidence(?P<threshold>[\d.]+))")
)
def test_tiny_diffusion(load, run):
    io, model = parity.arrays("tiny_diffusion"), load("tiny_diffusion")
    by_count = {"method": "topk", "k": int(run["k"] or 0)}
    settings = by_count if run["k"] else {"confidence_threshold": float(run["threshold"])}
    sampler = dataclasses.replace(published.preset(model, **settings).sampler, eos=-1, stops=())
    prompt = io["sampler/context"]
    expected = answer(io, run[0], prompt)
    tokens, passes = generated(model, sampler, prompt, expected.shape[1])
    np.testing.assert_array_equal(tokens, expected)
    assert passes == len(io[f"{run[0]}/t"])
