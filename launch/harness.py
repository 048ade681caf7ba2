"""Evaluates a model on tasks of EleutherAI's lm-evaluation-harness (pip install 'diffusion_lm[eval]').

    python -m launch.harness --workdir=runs/smollm2 --tasks=arc_easy,lambada_openai --out=out.json
    python -m launch.harness --workdir=runs/smollm2 --tasks=my_task --include_path=my_tasks --limit=100

Tasks of the harness download their data; a folder of --include_path may hold tasks over local files. The last line on
standard output is a JSON object: each task's metrics, and how they came about. docs/evaluation.md explains the numbers.
"""

import json
import math
from typing import Any

from diffusion_lm.inference import api, by_name, harness
from diffusion_lm.visualize.page import write_whole
from launch import command
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
WORKDIR = FLAGS.workdir()
TASKS = FLAGS.list("tasks", None, "Names of tasks and groups, separated by commas.", required=True)
INCLUDE_PATH = FLAGS.string("include_path", None, "Folder with tasks of your own (YAML files). Default: none.")
NUM_FEWSHOT = FLAGS.integer("num_fewshot", None, "Examples before each question. Default: the task's own number.", 0)
LIMIT = FLAGS.integer("limit", None, "First documents of each task to evaluate, for a trial. Default: all.", 1)
CHAT = FLAGS.bool("chat", False, "Asks by the model's own chat template.")
SAMPLER = FLAGS.enum(
    "sampler", None, [by_name.PUBLISHED, *sorted(set(by_name.SAMPLERS) - {"auto"})], "How answers are generated (see "
    "launch.sample). Default: a converted model's own, or the one that fits the network.",
)  # fmt: skip
DENOISING_STEPS = FLAGS.integer(
    "denoising_steps", None, "Most forward passes a canvas. Default: 12, or as many as the sampler needs.", 1
)
CANVAS_LENGTH = FLAGS.integer("canvas_length", 0, "Tokens that are denoised together; 0: as many as in training.", 0)
NOISE_DRAWS = FLAGS.integer(
    "noise_draws", 32, "Draws of noise for each likelihood that isn't exact, an even number.", 2
)
SEED = FLAGS.integer("seed", 0, "Seed of all draws, 0 to 2**32 - 1.", 0, 2**32 - 1)
BATCH_SIZE = FLAGS.integer("batch_size", 16, "Rows a forward pass, at most.", 1)
COMPUTE_DTYPE = FLAGS.enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Type of products. bfloat16: half the memory, and numbers "
    "that depend a little on the batch size.",
)  # fmt: skip
REQUEST_CACHE = FLAGS.string(
    "request_cache", None, "JSON Lines file of finished requests, which a run that was killed continues from. Default: "
    "--out with .requests.jsonl; without --out none.",
)  # fmt: skip
OUT = FLAGS.out()


def main() -> dict:
    command.needs("lm_eval", "eval", "launch.harness")
    out = OUT()
    cache = REQUEST_CACHE.value or (out and str(out.with_suffix(".requests.jsonl")))
    model = api.load(WORKDIR.value, allow_import=command.ALLOW_IMPORT.value)
    lm = harness.DiffusionLM(
        model, sampler=SAMPLER.value, denoising_steps=DENOISING_STEPS.value, canvas_length=CANVAS_LENGTH.value,
        draws=NOISE_DRAWS.value, seed=SEED.value, batch_size=BATCH_SIZE.value, compute_dtype=COMPUTE_DTYPE.value,
        request_cache=cache,
    )  # fmt: skip
    found = _evaluate(lm)
    result = {
        "results": _plain(found["results"]),
        "versions": found["versions"],
        "documents": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "num_fewshot": found["n-shot"],
        "workdir": WORKDIR.value,
        "chat": CHAT.value,
        **lm.get_model_info(),
    }
    if out:
        write_whole(out, (json.dumps(result) + "\n").encode())
    return result


def _evaluate(lm: harness.DiffusionLM) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    for defaults in (False, True) if INCLUDE_PATH.value else (True,):  # indexing the harness's own takes 10 s
        tasks = TaskManager(include_path=INCLUDE_PATH.value, include_defaults=defaults)
        if not (unknown := [name for name in TASKS.value if not tasks.match_tasks([name])]):
            break
    else:
        raise ValueError(f"--tasks: there is no task {', '.join(unknown)}; tasks of your own need --include_path")
    return lm_eval.simple_evaluate(
        model=lm, tasks=TASKS.value, task_manager=tasks, num_fewshot=NUM_FEWSHOT.value, limit=LIMIT.value,
        apply_chat_template=CHAT.value, log_samples=False, random_seed=SEED.value, numpy_random_seed=SEED.value,
        fewshot_random_seed=SEED.value, bootstrap_iters=1000,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """The value as JSON has it: NumPy's numbers as Python's, what isn't finite as null."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, str | bool) or value is None:
        return value
    return float(value) if math.isfinite(value) else None


if __name__ == "__main__":
    command.run(main, FLAGS)
