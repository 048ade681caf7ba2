"""Published samplers at the front door: defaults, generation_config.json, what is refused, ragged prompts."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import parity
from support.python_loops import generated, loops_in_python  # noqa: F401 (a fixture)
from support.sources import write_source

import diffusion_lm as dlm
from diffusion_lm.attention_patterns import Causal
from diffusion_lm.build import load_for_inference
from diffusion_lm.convert.loading import export, load_source, save
from diffusion_lm.inference import pipeline, published
from diffusion_lm.samplers.confidence import Confidence

pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """(family, generation_config.json) -> a folder."""

    def made(family, generation=None):
        folder = tmp_path_factory.mktemp(family)
        ends = {"eos_token_id": parity.config(family).get("eos_token_id", 0)}
        write_source(folder, family, {} if family == "tiny_diffusion" else ends, generation)
        return folder

    return made


@pytest.fixture(scope="module")
def llada(folder_of):
    settings = {
        "steps": 8,
        "block_length": 4,
        "max_new_tokens": 16,
        "eos_token_id": [490, 3],
        "repetition_penalty": 1.0,
    }
    return load_source(folder_of("llada", settings), dtype="float32")


def settings_of(model, **given):
    return published.preset(model, **given).sampler


def test_a_converted_model_writes_as_its_generation_config_says(llada):
    found = dlm.generate(llada, "w5 w6")
    assert found.nfe == 8 and found.num_tokens[0] <= 16 and llada.tokenizer.stops == (490, 3)
    made = dlm.make_sampler(llada)
    assert (made.sampler.block_length, made.sampler.denoising_steps, made.sampler.sampling.temperature) == (4, 8, 0.0)
    assert made == settings_of(llada) and made.stops == (3,)


def test_what_is_given_comes_first(llada):
    made = dlm.make_sampler(llada, denoising_steps=5, block_length=8)
    assert (made.sampler.block_length, made.sampler.denoising_steps) == (8, 5)
    assert settings_of(llada, temperature=0.5).sampler.sampling.temperature == 0.5
    ours = dlm.make_sampler(llada, "confidence")
    assert not ours.fitted and not ours.sampler.block_length and ours.sampler.sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("family", "generation", "cause"),
    [
        ("llada", {"penalty_alpha": 0.6}, "generation_config.json sets penalty_alpha=0.6, which isn't implemented"),
        ("llada", {"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ("llada", {"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3"),
        ("llada", {"remasking": "random"}, "remasking='random'"),
        ("llada", {"mask_token_id": 5}, "mask_token_id=5"),
        ("dream", {"alg": "p2"}, "alg='p2' isn't implemented: it is origin, entropy"),
        ("dream", {"alg_temp": 0.5}, "alg_temp=0.5"),
        ("sdar", {"remasking_strategy": "entropy_bounded"}, "remasking_strategy='entropy_bounded'"),
        ("llada2", {"temperature": -1}, "temperature must be"),
        (
            "diffusion_gemma",
            {"sampler_config": {"_cls_name": "Other"}},
            "isn't implemented: only EntropyBoundSamplerConfig",
        ),
        ("diffusion_gemma", {"sampler_config": {"entropy_bound": 1, "k": 2}}, "sets k=2, which isn't implemented"),
        ("mdlm", {"predictor": "tweedie"}, "predictor='tweedie' isn't implemented: it is ddpm_cache, ddpm, analytic"),
        ("sedd", {"predictor": "none"}, "predictor='none' isn't implemented: it is analytic, euler"),
        ("md4", {"sampling_grid": "even"}, "sampling_grid='even' isn't implemented: it is cosine or uniform"),
        ("bd3lm", {"first_hitting": False}, "first_hitting=False isn't implemented"),
        ("tiny_diffusion", {"method": "random"}, "method='random' isn't implemented: it is confidence or topk"),
        ("diffusion_gemma", {"repetition_penalty": 1.1}, "repetition_penalty=1.1 would count noise"),
        ("diffusion_gemma", {"do_sample": False}, "temperature that falls: set t_max and t_min"),
    ],
)
def test_what_a_file_asks_that_we_do_not_have_is_refused_by_name(folder_of, family, generation, cause):
    model = load_source(folder_of(family, generation), dtype="float32")
    with pytest.raises(ValueError, match=cause) as raised:
        dlm.make_sampler(model)
    assert "\n" not in str(raised.value)
    dlm.make_sampler(model, "renoise" if family == "diffusion_gemma" else "confidence")  # ours doesn't ask that file


def test_what_a_file_says_that_changes_nothing(folder_of):
    said = {"transformers_version": "5", "do_sample": False, "temperature": 0.7, "top_k": 20, "num_beams": 1,
            "use_cache": True, "mask_token_id": 503, "pad_token_id": 500, "max_length": None, "eps": 0.01}  # fmt: skip
    made = dlm.make_sampler(load_source(folder_of("dream", said), dtype="float32")).sampler
    assert (made.sampling.temperature, made.sampling.top_k, made.schedule.least.end) == (0.0, 20, 0.01)


@pytest.mark.usefixtures("loops_in_python")
def test_diffusion_gemma_samples_as_its_file_says(folder_of):
    """As wide as in training, whatever is asked for; --denoising_steps is its max_denoising_steps."""
    bound = {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.7}
    said = {"sampler_config": bound, "t_min": 0.3, "t_max": 0.9, "stability_threshold": 2, "max_denoising_steps": 4,
            "confidence_threshold": 0.1, "eos_token_id": [3, 5]}  # fmt: skip
    model = load_source(folder_of("diffusion_gemma", said), dtype="float32")
    made = dlm.make_sampler(model)
    inner = made.sampler
    assert (inner.schedule.bound, inner.min_temperature, inner.max_temperature) == (0.7, 0.3, 0.9)
    assert (inner.stability, inner.denoising_steps, inner.entropy_threshold, made.stops) == (2, 4, 0.1, (5,))
    assert dlm.make_sampler(model, denoising_steps=3, entropy_bound=0.2).sampler.denoising_steps == 3
    width = made.canvas_length
    assert made.slots(5, width + 1) == 5 + 2 * width and made.stages(width + 1)[0].max_steps == 2
    (cut, whole), passes = zip(*(generated(model, made, RAGGED, n) for n in (width - 1, width)), strict=True)
    np.testing.assert_array_equal(cut, whole[:, :-1])
    assert passes[0] == passes[1]


def test_a_repetition_penalty_is_applied_to_prompt_and_answer(folder_of):
    """To every token of a causal model, as computed from the whole text before it."""
    said = {"repetition_penalty": 1.3, "do_sample": False, "eos_token_id": 0}
    model = load_source(folder_of("qwen3", said), dtype="float32")
    prompt = np.array([5, 9, 2, 5], np.int32)
    sampler = dlm.make_sampler(model, suppressed=model.tokenizer.stops)
    found = pipeline.generate(model, sampler, [prompt], max_new_tokens=12, seed=0).generation
    written, plain = list(prompt), 0
    for _ in range(12):
        cache, text = model.network.empty_cache(1, 16), jnp.asarray([written + [0] * (16 - len(written))])
        head, _ = model.network.extend(cache, text, jnp.full(1, 16, jnp.int32), Causal())
        logits = np.array(head.logits()[0, len(written) - 1])
        logits[list(model.tokenizer.stops)] = -np.inf
        plain += logits.argmax() in written
        seen = np.unique(written)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        written.append(int(logits.argmax()))
    np.testing.assert_array_equal(found.tokens[0], written[4:])
    assert plain, "the prompt and the model must be such that the penalty matters"


def test_a_repetition_penalty_on_canvases(folder_of):
    """So strong that no token of the prompt, nor of another step, comes again."""
    model = load_source(folder_of("llada", {"block_length": 8}), dtype="float32")
    prompt = np.arange(1, 480, dtype=np.int32)[:12]
    plain, strong = (
        pipeline.generate(
            model, dlm.make_sampler(model, repetition_penalty=penalty), [prompt], max_new_tokens=8, seed=0
        )
        .generation.tokens[0]
        .tolist()
        for penalty in (1.0, 1e4)
    )
    assert len(set(strong) | set(prompt)) == len(strong) + len(prompt)
    assert plain != strong


def test_md4_samples_on_its_grid(folder_of):
    """No run of its sampler is stored: its settings, and a text of masks no more."""
    model = load_source(folder_of("md4", {"timesteps": 7, "topp": 0.98}), dtype="float32")
    inner = dlm.make_sampler(model).sampler
    assert inner.cosine and (inner.denoising_steps, inner.sampling.top_p) == (7, 0.98)
    assert inner.process.schedule == model.process.schedule
    assert not dlm.make_sampler(model, sampling_grid="uniform").sampler.cosine
    assert dlm.generate(model, "w5", max_new_tokens=8).nfe == 7


def test_unknown_settings_are_refused(llada):
    with pytest.raises(ValueError, match="has no alg: it has block_length"):
        dlm.make_sampler(llada, alg="entropy")
    with pytest.raises(ValueError, match="has no canvas_length"):
        dlm.make_sampler(llada, canvas_length=8)
    with pytest.raises(ValueError, match="fewer than the 4 blocks"):
        dlm.generate(llada, "w5", denoising_steps=3)


def test_the_file_goes_through_a_workdir_and_comes_back(folder_of, tmp_path):
    generation = {"confidence_threshold": 0.5, "denoising_steps": 2, "eos_token_id": [7, 3]}
    folder = folder_of("sdar", generation)
    straight = load_source(folder, dtype="float32")
    save(straight, tmp_path / "run")
    loaded = load_for_inference(tmp_path / "run")
    assert settings_of(loaded) == settings_of(straight) and loaded.tokenizer.stops == straight.tokenizer.stops
    export(loaded, tmp_path / "out")
    assert (tmp_path / "out/generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()


def test_a_model_of_ours_has_none(model):
    with pytest.raises(ValueError, match="only converted models have a published sampler"):
        dlm.make_sampler(model, "published")
    assert isinstance(dlm.make_sampler(model).sampler, Confidence)


# Text is never masks: lengths that no block divides, prompts of several lengths, one new token

RAGGED = [np.arange(1, 1 + n) for n in (5, 1, 3)]
FAMILIES = {
    "llada": {"block_length": 4},
    "dream": {"temperature": 0.0},
    "sdar": {"temperature": 0.0},
    "fastdllm_v2": {"canvas_length": 8, "small_block_size": 4, "threshold": 0.1},
}


@pytest.mark.cases(1)
@pytest.mark.usefixtures("loops_in_python")
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rows_are_whole_and_as_they_are_alone(folder_of, family):
    model = load_source(folder_of(family), dtype="float32")
    sampler = settings_of(model, **FAMILIES[family])
    tokens, _ = generated(model, sampler, RAGGED, 6)
    alone, _ = generated(model, sampler, RAGGED[1:2], 6)
    np.testing.assert_array_equal(alone[0], tokens[1])
    one, _ = generated(model, sampler, RAGGED, 1)
    for row in (*tokens, *one):  # masks only after an end of text, and no such end here
        assert len(row) in (1, 6) and not np.isin(row, (model.tokenizer.mask, *model.tokenizer.stops)).any()
