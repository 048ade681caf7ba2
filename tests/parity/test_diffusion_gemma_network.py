"""DiffusionGemma: encoding, canvases with and without self-conditioning, caches, and its sampler's passes.

Stored logits are of its own code; what a folder goes through is in test_conditioned_families.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import parity
from support.family import Loaded

import diffusion_lm as dlm
from diffusion_lm.attention_patterns import BlockDiffusionTraining, Causal
from diffusion_lm.build import load_for_inference
from diffusion_lm.convert.huggingface import open_folder, write_folder
from diffusion_lm.convert.loading import export, load_source, save
from diffusion_lm.models import diffusion_gemma
from diffusion_lm.models.family import ConfigReader
from diffusion_lm.models.family_index import family_of
from diffusion_lm.models.weights import write_tensors

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")


@functools.cache
def case():
    """The network, the arrays, and three functions that are compiled once."""
    loaded = Loaded(diffusion_gemma, parity.folder("diffusion_gemma"))
    model = loaded.model

    @jax.jit
    def encode(cache, tokens, count):
        head, cache = model.extend(cache, tokens, count, Causal())
        return head.logits(), cache

    @jax.jit
    def decode(cache, canvas, logits):
        """After a pass that predicted `logits`."""
        return model.denoise_canvas(cache, canvas, jnp.zeros(len(canvas)), self_cond=model.expected_embedding(logits))

    first = jax.jit(lambda cache, canvas: model.denoise_canvas(cache, canvas, jnp.zeros(len(canvas))))
    return loaded, parity.arrays("diffusion_gemma"), encode, decode, first


def encoded(rows, cache=None):
    """Logits, and a cache that holds each of the rows after what it held; at most two widths are compiled."""
    loaded, io, encode, _, _ = case()
    cache = loaded.model.empty_cache(len(rows), 48) if cache is None else cache
    widths = sorted({io[name].shape[1] for name in ("encode/input_ids", "commit/tokens")})
    width = next(n for n in widths if n >= max(map(len, rows)))
    tokens = jnp.asarray([np.pad(row, (0, width - len(row))) for row in rows], jnp.int32)
    return encode(cache, tokens, jnp.asarray([len(row) for row in rows], jnp.int32))


def test_logits_are_its_own():
    """The next token's; a canvas's, first and after a prediction; and a canvas after a committed one."""
    loaded, io, _, decode, first = case()
    logits, cache = encoded(io["encode/input_ids"])
    loaded.close(np.asarray(logits), io["encode/next_token_logits"])
    canvas = jnp.asarray(io["decode/canvas"])
    loaded.close(np.asarray(first(cache, canvas)), io["decode/logits"])
    loaded.close(
        np.asarray(decode(cache, canvas, jnp.asarray(io["decode/soft_from_logits"]))), io["decode/logits_with_soft"]
    )
    _, longer = encoded(io["commit/tokens"], cache)
    loaded.close(np.asarray(first(longer, jnp.asarray(io["commit/canvas"]))), io["commit/logits"])


def test_the_cache_holds_its_keys_and_values():
    _, io, *_ = case()
    length = io["encode/input_ids"].shape[1]
    _, cache = encoded(io["encode/input_ids"])
    for i, layer in enumerate(cache.layers):
        keys, values = io[f"encode/cache_k{i}"], io[f"encode/cache_v{i}"]
        kept = slice(length - keys.shape[2], length)  # sliding layers keep less
        np.testing.assert_allclose(jnp.swapaxes(layer.k, 2, 3)[:, :, kept], keys, atol=1e-5)
        np.testing.assert_allclose(layer.v[:, :, kept], values, atol=1e-5)


def test_prompts_of_several_lengths():
    loaded, io, _, _, first = case()
    masks = io["padded/attention_mask"].astype(bool)
    _, cache = encoded([row[mask] for row, mask in zip(io["padded/input_ids"], masks, strict=True)])
    loaded.close(np.asarray(first(cache, jnp.asarray(io["padded/canvas"]))), io["padded/logits"])


def test_a_training_row_is_the_same_network():
    """[noisy ; clean] without a cache: its windows begin where a canvas does, as with one."""
    loaded, io, _, _, first = case()
    size = loaded.described.layout.size
    clean = jnp.asarray(np.concatenate([io["encode/input_ids"][:, :size], io["commit/tokens"]], axis=1))
    noisy, attention = jnp.asarray(io["decode/canvas"]), BlockDiffusionTraining(size, Causal())
    both = attention.join(jnp.concatenate([clean[:, :size], noisy], axis=1), clean)
    positions = jnp.broadcast_to(jnp.arange(clean.shape[1], dtype=jnp.int32)[None], clean.shape)
    run = jax.jit(lambda tokens: [
        head.logits() for head in loaded.model.denoise(
            tokens, jnp.zeros((2, 4)), attention=attention, positions=positions, segment_ids=jnp.ones_like(positions)
        )
    ])  # fmt: skip
    noisy_logits, next_logits = run(both)
    logits, cache = encoded(np.asarray(clean[:, :size]))
    np.testing.assert_allclose(next_logits[:, :size], logits, atol=1e-4)
    np.testing.assert_allclose(noisy_logits[:, size:], first(cache, noisy), atol=1e-4)


def test_passes_of_its_sampler():
    """Each pass of a stored first canvas, given what the pass before predicted at its temperature."""
    loaded, io, _, decode, first = case()
    run = {key.removeprefix("sampler/default_s8/"): io[key] for key in io if key.startswith("sampler/default_s8/")}
    _, cache = encoded(run["prompt"])
    passes = np.flatnonzero(run["canvas_start"] == run["prompt"].shape[1])
    assert len(passes) > 1
    for k in passes:
        canvas, before = jnp.asarray(run["canvas"][k]), k - 1
        if k == passes[0]:
            found = first(cache, canvas)
        else:
            found = decode(cache, canvas, jnp.asarray(run["logits"][before] / run["temperature"][before]))
        going = ~run["done"][before] if k else np.full(len(canvas), True)
        loaded.close(np.asarray(found), run["logits"][k], going)


def test_tensors_come_back_bit_for_bit():
    loaded, *_ = case()
    found = dict(write_tensors(loaded.leaves, loaded.model.params, np.float32))
    for name, array in found.items():
        stored = loaded.tensors[name].read()
        assert array.shape == stored.shape and array.tobytes() == stored.tobytes(), name
    assert all(diffusion_gemma.is_buffer(name) for name in loaded.tensors.keys() - found.keys())


def test_both_spellings_of_its_config_are_one_network():
    folder = parity.folder("diffusion_gemma")
    reader = ConfigReader(json.loads((folder / "config_transformers5.json").read_text()))
    assert diffusion_gemma.describe(reader) == case()[0].described
    reader.finish()
    assert family_of(open_folder(folder).config) is diffusion_gemma


def written(path, tensors=None):
    """Its folder with a tokenizer of characters, and other tensors."""
    source = open_folder(parity.folder("diffusion_gemma"))
    vocab = {chr(256 + i): i for i in range(source.config["text_config"]["vocab_size"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=chr(256)))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    arrays = {name: info.read() for name, info in source.tensors.items()} | (tensors or {})
    write_folder(path, source.config, arrays.items(), source.companions | {"tokenizer.json": made.to_str().encode()})
    return path


def test_a_folder_is_loaded_sampled_kept_and_given_back(tmp_path):
    folder = written(tmp_path / "model")
    model = dlm.load(folder)
    assert model.tokenizer.stops == (1, 9, 30)
    text = dlm.generate(model, chr(300) * 9, max_new_tokens=12, denoising_steps=3, sampler="renoise")
    assert text.nfe > 1
    save(model, tmp_path / "run")
    again = load_for_inference(tmp_path / "run")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.network.params, model.network.params)
    export(again, tmp_path / "out")
    ours, theirs = open_folder(tmp_path / "out"), open_folder(folder)
    assert ours.config == theirs.config and ours.companions == theirs.companions
    kept = {name for name in theirs.tensors if not diffusion_gemma.is_buffer(name)}
    assert ours.tensors.keys() == kept  # what reads images isn't
    assert all(ours.tensors[name].read().tobytes() == theirs.tensors[name].read().tobytes() for name in kept)


def test_a_scale_that_is_stored_twice_and_differs_is_refused(tmp_path):
    name = "model.encoder.language_model.layers.1.layer_scalar"
    with pytest.raises(ValueError, match=r"layers.1.layer_scalar and .*layers.1.layer_scalar differ"):
        load_source(written(tmp_path / "model", {name: np.full(1, 3.0, np.float32)}))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"hidden_activation": "silu"}, "text_config sets hidden_activation='silu'"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"enable_moe_block": 3}, "enable_moe_block=3, which isn't implemented"),
        ({"layer_types": ["full_attention"] * 3}, "one of sliding_attention and full_attention for each layer"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "sets sliding_window for layer 1"),
    ],
)
def test_what_its_config_asks_that_we_do_not_have_is_refused_by_name(changes, cause):
    folder = parity.folder("diffusion_gemma")
    text = parity.config("diffusion_gemma")["text_config"]
    with pytest.raises(ValueError, match=cause):
        Loaded(diffusion_gemma, folder, {"text_config": text | changes})
