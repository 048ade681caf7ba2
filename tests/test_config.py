import dataclasses
import json
from pathlib import Path

import pytest

from diffusion_lm.config import Config, Data, from_json, load, override, to_json
from diffusion_lm.data.tokenizer import train_tokenizer
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.schedules import Polynomial
from diffusion_lm.training.checkpoint import CheckpointMeta
from diffusion_lm.training.optimizer import AdamW, WarmupStableDecay
from diffusion_lm.validation import check_config, check_workdir

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")
CONFIG = Config(
    data=Data(path="text.txt"),
    model=DenoiserSpec(width=64, layers=2, heads=2),
    process=Absorbing(schedule=Polynomial(power=2.0)),
    objective=BlockELBO(block_size=8),
    optim=AdamW(schedule=WarmupStableDecay(warmup=5)),
)


def test_overrides_take_the_field_s_type():
    text = "optim.lr=1e-4 train.steps=7 model.tie_embeddings=false data.path=a=b.txt data.tokenizer=x.model"
    changed = override(CONFIG, [*text.split(), "data.tokenizer_kind=char"])
    changed = override(changed, ["process.schedule.power=3", "objective.block_size=4", "optim.schedule.decay=9"])
    assert (changed.optim.lr, changed.train.steps, changed.model.tie_embeddings) == (1e-4, 7, False)
    assert (changed.data.path, changed.data.tokenizer, changed.data.tokenizer_kind) == ("a=b.txt", "x.model", "char")
    assert changed.process.schedule == Polynomial(power=3.0) and type(changed.process.schedule.power) is float
    assert (changed.objective.block_size, changed.optim.schedule.decay) == (4, 9)
    assert override(changed, ["data.tokenizer=none"]).data.tokenizer is None
    assert override(CONFIG, []) == CONFIG


def test_overrides_hold_together_and_the_last_one_counts():
    both = override(CONFIG, ["train.batch_size=6", "train.grad_accum_steps=3", "train.batch_size=9"]).train
    assert (both.batch_size, both.grad_accum_steps) == (9, 3)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.learning_rate=1", r"unknown key optim.learning_rate; did you mean optim\.\w+\?"),
        ("train.step=1", r"unknown key train.step; did you mean train.steps\?"),
        ("optimizer.lr=1", r"unknown key optimizer.lr; did you mean optim.lr\?"),
        ("lr=1", r"unknown key lr; did you mean optim.lr\?"),
        ("process.schedule.low=1", r"unknown key process.schedule.low; did you mean process.schedule.power\?"),
        ("train.steps=1.5", r"train.steps takes int; got '1.5'"),
        ("train.steps=1e3", r"train.steps takes int; got '1e3'"),
        ("train.steps=", r"train.steps takes int; got ''"),
        ("optim.lr=fast", r"optim.lr takes float; got 'fast'"),
        ("model.tie_embeddings=1", r"model.tie_embeddings takes one of true, false; got '1'"),
        ("data.tokenizer_kind=bpe", r"data.tokenizer_kind takes one of unigram, char; got 'bpe'"),
        ("model=big", r"model is a group of fields; set one of model.width"),
        ("train.steps.more=1", r"train.steps.more: steps is a int, it has no fields"),
        ("train.steps", r"--set takes KEY=VALUE"),
        ("train.steps=0", r"train.steps must be positive; got 0"),
        ("optim.lr=nan", r"optim.lr"),
        ("mesh.data=0", r"mesh"),
        ("seed=-1", r"seed"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(assignment, message):
    with pytest.raises(ValueError, match=message) as error:
        override(CONFIG, [assignment])
    assert "\n" not in str(error.value)


def test_json_round_trip():
    text = json.dumps(to_json(CONFIG))
    assert from_json(json.loads(text)) == CONFIG


def test_a_tokenizer_with_bytes_survives_json():
    tokenizer = train_tokenizer(["some text"], vocab=300, kind="char")
    config = dataclasses.replace(CONFIG, data=Data(path="text.txt", tokenizer=tokenizer))
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config and again.data.tokenizer.proto == tokenizer.proto


@pytest.mark.parametrize("found", [None, 1, 3, "2"])
def test_another_format_is_refused_in_one_line(found):
    tree = to_json(CONFIG) | {"format": found}
    assert to_json(CONFIG)["format"] == 2
    with pytest.raises(ValueError, match=f"has format {found}, and this version reads 2"):
        from_json(tree)
    with pytest.raises(ValueError, match="has format None"):
        from_json({key: value for key, value in tree.items() if key != "format"})


def test_a_json_file_is_a_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + json.dumps(to_json(CONFIG)), encoding="utf-8")
    assert load(str(path)) == CONFIG
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        load(str(path))


@pytest.mark.parametrize("value", [{1: 2}, [1], {3}, Path("x")])
def test_what_json_cannot_hold(value):
    with pytest.raises(ValueError, match="a config holds plain values"):
        to_json(dataclasses.replace(CONFIG, data=Data(path=value)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_loads_and_survives_json(path):
    config = load(str(path))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert load(str(path)) == config
    docstring = path.read_text().split('"""')[1]
    assert "python -m launch." in docstring and "Hardware" in docstring


@pytest.mark.parametrize("kind", ["ar", "masked", "block", "joint"])
def test_the_argument_of_a_config(kind):
    config = load(f"{ROOT}/configs/tinyshakespeare.py:{kind}")
    assert from_json(to_json(config)) == config


def changed_json(path, value):
    tree = part = to_json(CONFIG)
    *groups, last = path.split(".")
    for group in groups:
        part = part[group]
    part[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.depth", 3, "config.model of class DenoiserSpec has no field depth"),
        ("model.class", "os:system", "'os:system' is not a dataclass of diffusion_lm"),
        ("model.class", "diffusion_lm.config:load", "is not a dataclass of diffusion_lm"),
        ("model.class", "diffusion_lm.nothing:Here", "is not a dataclass of diffusion_lm"),
        ("model.class", None, "None is not a dataclass of diffusion_lm"),
        ("train.steps", "10", "train.steps takes int; got '10'"),
        ("train.steps", True, "train.steps takes int; got True"),
        ("model.width", None, "model.width takes int; got None"),
        ("data.tokenizer_kind", "bpe", "data.tokenizer_kind takes .*; got 'bpe'"),
    ],
)
def test_json_is_as_strict(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_json(changed_json(path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no get_config"),
        ("def get_config(): return 3", "returned int, not a"),
        ("def get_config(: pass", "can't be run: SyntaxError"),
        ("import nothing_of_this_name", "can't be run: ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load(str(tmp_path / "c.py"))
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file"):
        load(str(tmp_path / "none.py"))
    with pytest.raises(ValueError, match="kind 'nope' is none of ar, masked"):
        load(f"{ROOT}/configs/tinyshakespeare.py:nope")


def test_what_may_change_between_a_checkpoint_and_its_continuation():
    meta = CheckpointMeta(config=json.loads(json.dumps(to_json(CONFIG))), tokenizer={}, corpus="")
    here = Path("here/3")
    check_config(CONFIG, meta, here)
    check_config(
        override(CONFIG, ["train.steps=7", "optim.lr=1", "checkpoint.save_every=3", "mesh.fsdp=2"]), meta, here
    )
    with pytest.raises(ValueError, match=r"match here/3: model.layers=3 \(it has 2\), objective.block_size=4") as error:
        check_config(
            override(CONFIG, ["model.layers=3", "objective.block_size=4", "train.steps=7"]), meta, Path("here/3")
        )
    assert "train.steps" not in str(error.value)
    other = dataclasses.replace(CONFIG, process=Absorbing())
    with pytest.raises(ValueError, match=r"process\.schedule\.class"):
        check_config(other, meta, here)


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="is not a folder"):
            check_workdir(place)
    check_workdir(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
