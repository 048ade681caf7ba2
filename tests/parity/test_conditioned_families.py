"""Families whose network has a form of its own: DiTs (MDLM, BD3-LM, SEDD), MD4, tiny-diffusion.

Their logits at stored inputs and times, losses at stored noise, and the way from a folder to a workdir and back.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import parity
from support.commands import result
from support.family import Loaded

import diffusion_lm as dlm
from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Full
from diffusion_lm.build import load_for_inference
from diffusion_lm.convert.huggingface import open_folder, write_folder
from diffusion_lm.convert.loading import export, load_source, save
from diffusion_lm.models import bd3lm, md4, mdlm, sedd, tiny_diffusion
from diffusion_lm.models.family_index import family_of
from diffusion_lm.models.weights import write_tensors
from diffusion_lm.types import DenseLogits
from launch import convert, sample

FAMILIES = {"bd3lm": bd3lm, "md4": md4, "mdlm": mdlm, "sedd": sedd, "tiny_diffusion": tiny_diffusion}
pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")


@pytest.fixture(scope="module")
def case(request):
    return Loaded(FAMILIES[request.param], parity.folder(request.param)), parity.arrays(request.param)


def of(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


def predict(loaded, tokens, t, attention, length=None):
    """The LogitsHead, or heads, at times t [B, n] of a text of `length` positions."""
    shape = tokens.shape[0], length or tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    return loaded.model.denoise(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(t, jnp.float32), attention=attention, positions=positions,
        segment_ids=jnp.ones_like(positions),
    )  # fmt: skip


def close(loaded, head, expected):
    loaded.close(np.asarray(head.logits()), expected[..., : loaded.spec.vocabulary.size])


def time_of(sigma):
    """The share of masks that a total noise leaves."""
    return -np.expm1(-sigma.astype(np.float64))[:, None]


def process_of(loaded):
    return loaded.described.process.sized(mask=loaded.spec.vocabulary.mask, width=loaded.spec.width)


def rows_nelbo(process, head, x0, xt, t):
    """nats [B]."""
    x0, xt, t = jnp.asarray(x0, jnp.int32), jnp.asarray(xt, jnp.int32), jnp.asarray(t, jnp.float32)
    found = [
        process.nelbo(jax.tree.map(lambda a, i=i: a[i : i + 1], dense(head)), x0[i : i + 1], xt[i : i + 1],
                      t[i : i + 1], jnp.ones((1, x0.shape[1])), 0)
        for i in range(len(x0))
    ]  # fmt: skip
    return np.asarray(found)


def dense(head):
    return DenseLogits(values=head.logits())


@of("tiny_diffusion")
def test_tiny_diffusion(case):
    loaded, io = case
    t = (io["forward/t"] + 1) / loaded.spec.learned_times
    close(loaded, predict(loaded, io["forward/x"], t[:, None], Full()), io["forward/logits"])


@of("md4")
def test_md4(case):
    loaded, io = case
    runs = [name.removesuffix("/logits") for name in io if name.endswith("/logits")]
    assert runs
    for run in runs:
        close(loaded, predict(loaded, io[f"{run}/zt"], io[f"{run}/t_used"][:, None], Full()), io[f"{run}/logits"])


@of("mdlm")
def test_mdlm(case):
    """Also its loss; and a network that is told the noise."""
    loaded, io = case
    time = time_of(io["forward/sigma"])
    close(loaded, predict(loaded, io["forward/xt"], time, Full()), io["forward/backbone_logits_model_sigma"])
    told = Loaded(mdlm, parity.folder("mdlm"), {"time_conditioning": True})
    close(told, predict(told, io["forward/xt"], time, Full()), io["forward/backbone_logits_true_sigma"])
    xt, t = io["loss/subs_cont/xt"], io["loss/subs_cont/t"][:, None]
    nats = rows_nelbo(process_of(loaded), predict(loaded, xt, t, Full()), io["x0"], xt, t)
    np.testing.assert_allclose(nats, io["loss/subs_cont/nlls"].sum(-1), rtol=2e-5)


@of("sedd")
def test_sedd(case):
    """Its log scores, and its loss: SEDD's time t is ours at 0.999 t, so that its rate is 0.999 of ours."""
    loaded, io = case
    head = predict(loaded, io["xt"], time_of(io["sigma"]), Full())
    tokens = loaded.spec.vocabulary.size
    scores = np.asarray(head.logits()) - (np.log(np.expm1(io["sigma"])) + np.log(tokens))[:, None, None]
    of_others = np.arange(tokens) != io["xt"][..., None]  # its code sets a token's own score to 1
    loaded.close(scores, io["forward/log_score"][..., :tokens], of_others)
    nats = rows_nelbo(process_of(loaded), head, io["x0"], io["xt"], time_of(io["sigma"]))
    np.testing.assert_allclose(0.999 * nats, io["loss/per_example"], rtol=2e-5)


def bd3lm_runs():
    return [name.split("/")[1] for name in parity.arrays("bd3lm") if name.endswith("train_backbone_logits")]


def test_bd3lm():
    """[noisy ; clean] in blocks of every stored size, its loss, and clean blocks as its sampler reads them."""
    io, folder = parity.arrays("bd3lm"), parity.folder("bd3lm")
    assert bd3lm_runs()
    for number, run in enumerate(bd3lm_runs()):
        size = int(run.removeprefix("bs"))
        loaded = Loaded(bd3lm, folder, {"block_size": size})
        assert loaded.described.layout.size == size
        attention, x0 = BlockDiffusionTraining(size, BlockCausal(size)), io["x0"]

        def noisy(xt, loaded=loaded, attention=attention, x0=x0):
            both = attention.join(jnp.asarray(xt, jnp.int32), jnp.asarray(x0, jnp.int32))
            return predict(loaded, both, np.zeros((len(x0), 2)), attention, x0.shape[1])[0]

        close(loaded, noisy(io["forward/xt"]), io[f"forward/{run}/train_backbone_logits"])
        if not number:  # the others differ in their attention only
            xt, t = io[f"loss/{run}/xt"], io[f"loss/{run}/t"][:, ::size]
            nats = rows_nelbo(process_of(loaded), noisy(xt), x0, xt, t)
            np.testing.assert_allclose(nats, io[f"loss/{run}/nlls"].sum(-1), rtol=2e-5)
            read = io[f"forward/{run}/sample_mode_x"]
            head = predict(loaded, read, np.zeros((len(read), 1)), BlockCausal(size))
            close(loaded, head, io[f"forward/{run}/sample_mode_backbone_logits"])


@of(*FAMILIES)
def test_tensors_come_back_bit_for_bit(case):
    loaded, _ = case
    found = dict(write_tensors(loaded.leaves, loaded.model.params, np.float32))
    for name, array in found.items():
        assert array.tobytes() == loaded.tensors[name].read().tobytes(), name
    assert all(loaded.tensors[name].shape == array.shape for name, array in found.items())


def characters(count):
    """A tokenizer of so many characters, as the files of a folder."""
    vocab = {chr(161 + i): i for i in range(count)}
    files = tiny_diffusion.companions()
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": chr(161)}
    return {"tokenizer.json": json.dumps(json.loads(files["tokenizer.json"]) | {"model": model}).encode()}


@pytest.fixture(scope="module")
def folder_with(tmp_path_factory):
    """A family's folder, with a tokenizer where it needs one, and with changes."""

    def make(name, changes=None, tensors=None):
        source, path = open_folder(parity.folder(name)), tmp_path_factory.mktemp(name) / "model"
        arrays = {key: info.read() for key, info in source.tensors.items()} | (tensors or {})
        needs, tokens = name != "tiny_diffusion", source.config.get("vocab_size", source.config.get("tokens"))
        config = source.config | ({"eos_token_id": 7} if needs else {}) | (changes or {})
        kept = {key: value for key, value in arrays.items() if value is not None}
        write_folder(path, config, kept.items(), characters(tokens - 1) if needs else {})
        return path

    return make


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_loaded_sampled_kept_and_given_back(name, folder_with, tmp_path):
    folder = folder_with(name)
    model = dlm.load(folder)
    assert model.process == type(model.process)(schedule=model.process.schedule, mask=model.tokenizer.mask)
    steps = None if name in ("bd3lm", "tiny_diffusion") else 4  # those take as many as they need
    assert dlm.generate(model, "", max_new_tokens=8, denoising_steps=steps).nfe > 0
    save(model, tmp_path / "run")
    again = load_for_inference(tmp_path / "run")
    assert again.config == model.config and again.tokenizer == model.tokenizer
    jax.tree.map(np.testing.assert_array_equal, again.network.params, model.network.params)
    export(again, tmp_path / "out")
    ours, theirs = open_folder(tmp_path / "out"), open_folder(folder)
    assert ours.config == theirs.config and ours.companions == theirs.companions
    assert ours.tensors.keys() == theirs.tensors.keys()
    for key, info in theirs.tensors.items():
        assert ours.tensors[key].read().tobytes() == info.read().tobytes(), key


def test_the_launcher_converts_a_folder_without_model_type_and_samples(tmp_path, capsys):
    folder, workdir = parity.folder("tiny_diffusion"), f"--workdir={tmp_path}/run"
    assert result(capsys, convert, f"--source={folder}", workdir)["model_type"] == "tiny_diffusion"
    found = result(capsys, sample, workdir, "--prompt=ROMEO:", "--max_new_tokens=8")
    assert found["texts"][0]["prompt"] == "ROMEO:"


def test_a_folder_without_a_tokenizer_says_which_it_needs():
    for name, cause in {"mdlm": "no tokenizer.json: put it there, GPT-2's", "md4": "one id a character"}.items():
        with pytest.raises(ValueError, match=cause) as raised:
            load_source(parity.folder(name))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "changes", "cause"),
    [
        ("mdlm", {"mlp_ratio": 2}, "mlp_ratio=2, which isn't implemented"),
        ("mdlm", {"n_heads": 3}, "n_heads=3 must divide"),
        ("bd3lm", {"time_conditioning": True}, "time_conditioning=True; only False"),
        ("bd3lm", {"adaln": False}, "adaln=False; only True"),
        ("sedd", {"graph": {"type": "uniform"}}, "graph sets type='uniform'; only 'absorb'"),
        ("sedd", {"noise": {"type": "geometric"}}, "noise sets type='geometric'"),
        ("sedd", {"model": "small"}, "model='small'; it must be an object"),
        ("md4", {"cond_type": "adaln"}, "cond_type='adaln'"),
        ("md4", {"data_shape": [32, 32]}, "only text"),
        ("md4", {"noise_schedule": "sigmoid"}, "noise_schedule='sigmoid'"),
        ("tiny_diffusion", {"mask_token_id": 1}, "mask_token_id=1; only 0"),
    ],
)
def test_what_a_config_asks_that_we_do_not_have_is_refused_by_name(name, changes, cause):
    with pytest.raises(ValueError, match=cause):
        Loaded(FAMILIES[name], parity.folder(name), changes)


@pytest.mark.parametrize(
    ("name", "tensor", "value", "cause"),
    [
        ("mdlm", "backbone.output_layer.linear.bias", None, "has no tensor backbone.output_layer.linear.bias"),
        ("sedd", "blocks.7.norm1.weight", np.ones(3, np.float32), "holds blocks.7.norm1.weight, which"),
        ("bd3lm", "backbone.rotary_emb.inv_freq", np.ones(8, np.float32), "with other numbers than its config"),
        ("md4", "classifier.Embed_0.embedding", np.ones((3, 3), np.float32), r"of shape \(3, 3\)"),
        ("tiny_diffusion", "time_emb.weight", None, "has no tensor time_emb.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line(name, tensor, value, cause, folder_with):
    with pytest.raises(ValueError, match=cause) as raised:
        load_source(folder_with(name, tensors={tensor: value}))
    assert "\n" not in str(raised.value)


def test_the_family_of_a_config_is_found():
    for name, family in FAMILIES.items():
        assert family_of(parity.config(name)) is family
