"""Somebody's model as one of ours: the same straight, through a workdir, and given back; bad input is one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from support.commands import call, launch, result

import diffusion_lm as dlm
from diffusion_lm.build import load_for_inference
from diffusion_lm.convert.huggingface import open_folder, write_folder
from diffusion_lm.convert.loading import export, load_source, open_source, save
from launch import convert, evaluate, sample

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")
WIDTH, HEADS, HEAD_DIM, MLP, IDS = 16, 2, 8, 24, 320
CONFIG = {
    "model_type": "llama", "vocab_size": IDS, "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": HEAD_DIM, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"


def tokenizer_files():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|text|>", "<|start|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (IDS, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            f"{at}self_attn.k_proj.weight": (HEAD_DIM, WIDTH),
            f"{at}self_attn.v_proj.weight": (HEAD_DIM, WIDTH),
            f"{at}self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            f"{at}mlp.gate_proj.weight": (MLP, WIDTH),
            f"{at}mlp.up_proj.weight": (MLP, WIDTH),
            f"{at}mlp.down_proj.weight": (WIDTH, MLP),
            f"{at}input_layernorm.weight": (WIDTH,),
            f"{at}post_attention_layernorm.weight": (WIDTH,),
        }
    return {name: rng.normal(0, 0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model"
    write_folder(path, CONFIG, tensors().items(), tokenizer_files(), shard_bytes=9000)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_source(folder)


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """Converted by the launcher."""
    home = tmp_path_factory.mktemp("home")
    done = launch("convert", f"--source={folder}", f"--workdir={home}/run", home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model_type"] == "llama" and found["objective"] == "AutoregressiveLoss"
    assert found["parameters"] > sum(a.size for a in tensors().values())  # the mask's row, and padding
    return home / "run"


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_workdir_holds_the_same_model(model, workdir):
    again = load_for_inference(workdir)
    same(again.network.params, model.network.params)
    assert again.tokenizer == model.tokenizer and again.config == model.config


def test_an_export_is_the_source(workdir, folder, tmp_path, capsys):
    result(capsys, convert, f"--workdir={workdir}", f"--export={tmp_path}/out")
    ours, theirs = open_folder(tmp_path / "out"), open_folder(folder)
    assert ours.config == theirs.config and ours.companions == theirs.companions
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, info in theirs.tensors.items():
        assert ours.tensors[name].read().tobytes() == info.read().tobytes(), name


def test_the_front_door_loads_a_folder_and_writes(folder, workdir):
    straight = dlm.generate(dlm.load(folder), "the cat", max_new_tokens=6, temperature=0.0, sampler="autoregressive")
    through = dlm.generate(dlm.load(workdir), "the cat", max_new_tokens=6, temperature=0.0, sampler="autoregressive")
    assert straight.texts == through.texts and straight.num_tokens == through.num_tokens


def test_a_chat_by_the_launcher(workdir, capsys):
    said = "--chat", "--prompt=the <|end|> cat", "--system=mat", "--max_new_tokens=4"
    found = result(capsys, sample, f"--workdir={workdir}", "--sampler=autoregressive", *said)
    assert found["texts"][0]["prompt"] == "the <|end|> cat"


def test_bfloat16_is_kept_and_is_half(folder, tmp_path):
    model = load_source(folder, dtype="bfloat16")
    save(model, tmp_path / "run")
    same(load_for_inference(tmp_path / "run").network.params, model.network.params)
    assert model.network.params["embedding"].dtype == jax.numpy.bfloat16
    assert model.network.params["layer_0"]["attention_norm"]["scale"].dtype == np.float32


def test_evaluating_needs_a_text(workdir, tmp_path, capsys):
    status, _, err = call(capsys, evaluate, f"--workdir={workdir}")
    assert status == 2 and "came without text" in err.splitlines()[-1]
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 20)
    small = "--batch_size=2", "--seq_len=32"
    found = result(capsys, evaluate, f"--workdir={workdir}", f"--data={tmp_path}/text.txt", *small)
    assert found["seq_len"] == 32 and found["causal"]["standard_error"] == 0


def _changed(folder, path, **changes):
    shutil.copytree(folder, path)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"num_hidden_layers": 3}, "has no tensor"),
        ({"num_hidden_layers": 1}, "which a network of its config.json doesn't have"),
        ({"intermediate_size": 25}, "its config.json makes it"),
        ({"vocab_size": 12}, "its config.json makes it"),
        ({"eos_token_id": None}, "no eos_token_id"),
        ({"logit_scale": 2.0}, "logit_scale=2.0, which isn't implemented"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(folder, tmp_path, changes, cause):
    source = _changed(folder, tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=cause) as raised:
        save(load_source(source), tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_a_workdir_or_folder_that_holds_something_stays(model, workdir, tmp_path):
    with pytest.raises(Exception, match="holds step 0 already"):
        save(model, workdir)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(FileExistsError, match="holds something"):
        export(model, tmp_path / "used")


def test_sources_that_are_not_there():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        open_source("package:no-such-package")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        open_source("nowhere")
