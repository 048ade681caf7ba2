"""Random command lines over all launchers, for tests/launch/test_command_lines.py."""

import importlib
import os

from hypothesis import strategies as st

from configs import tinyshakespeare
from launch import sample, sampler_flags
from support.commands import SMALL

NUMBER = int(os.environ.get("COMMAND_LINES", 0))
LAUNCHERS = ("sample", "evaluate", "train", "convert", "compare", "compile", "benchmark", "quickstart", "harness",
             "planning.scoreboard", "planning.rescore")  # fmt: skip
WEIGHTS = ("sample",) * 8 + ("evaluate",) * 2 + ("train",) * 3 + LAUNCHERS
# Not drawn: they would wait for other processes, or keep settings of this one.
LEFT_OUT = {"help", "distributed", "num_processes", "process_id", "host_timeout", "compile_cache", "profile", "charts"}
INTEGERS = ["0", "1", "2", "3", "4", "7", "16", "17", "33", "-1", "100", "2147483648", "1.5", "x", "", "nan"]
FLOATS = ["0", "0.1", "0.5", "0.9", "1", "1.5", "3", "-1", "1e9", "nan", "inf", "1e400", "x", ""]
SMALL_INTEGERS = ["0", "1", "2", "3", "-1", "x"]  # where more would take long
TEXTS = ["Line 3: the cat", "Line ", "", " ", "\n", "▁", "a" * 70, "<s>", "caf\udce9", "Ж", "[[3]]", "Line [[2-3]] the"]
PATHS = {
    "workdir": ["work", "work", "work", "none", "text.txt", "", "empty", "folder/x"],
    "source": ["work", "none", "text.txt", "empty", "package:none", "package:json", "", "bad.gguf"],
    "export": ["new", "work", "text.txt", "none/x/y", ""],
    "data": ["text.txt", "none.txt", "empty", "records.jsonl", "bad.jsonl", "*.txt", "", "python-none"],
    "out": ["out.json", "none/out.json", "empty", "", "text.txt/out.json"],
    "documents": ["out.jsonl", "none/out.jsonl", "empty", ""],
    "view": ["page.html", "none/page.html", "page.png", "", "terminal"],
    "config": ["configs/quickstart.py", "configs/quickstart.py:x", "configs/tinyshakespeare.py:masked", "none.py",
               "text.txt", "", "configs/tinyshakespeare.py:none"],
    "include_path": ["empty", "none", ""],
    "request_cache": ["cache.jsonl", "text.txt", "none/c.jsonl"],
    "predictions": ["text.txt", "none", "empty"],
    "judge": ["work", "none"],
    "tests": ["text.txt", "none", "sudoku4=none"],
}  # fmt: skip
CHOICES = {
    "set": ["train.steps=2", "train.steps=0", "train.steps=x", "model.width=33", "model.widht=3", "model", "=",
            "data.path=none.txt", "optim.lr=nan", "optim.lr=1e3", "objective.block_size=7", "exec.compute_dtype=int8",
            "exec.attention_kernel=splash", "train.batch_size=0", "train.grad_accum_steps=3", "checkpoint.save_every=0",
            "data.tokenizer=none.model", "mesh.data=3", "seed=-1", "train.ema_decay=2", "data.val_fraction=1"],
    "sampler": ["confidence", "threshold", "factor", "entropy_bound", "ancestral", "remask_cap", "remask_rescale",
                "remask_confidence", "remask_loop", "renoise", "embedding_flow", "autoregressive", "speculative",
                "confidnce", "", "os:path", "none:None", ":"],
    "kinds": ["ar", "masked", "ar,none", "", "ar:x", "sudoku4"],
    "tasks": ["none", "", "sudoku4", "sudoku4,x"],
    "topology": ["cpu:1", "cpu:0", "x", "v5e:0x4", "cpu:", ""],
    "allow_import": ["support", "none", "", "os"],
    "experiment": ["sudoku4-ar", "x", ""],
    "denoising_steps": ["1", "2", "3", "100001", "0", "-1", "x", "1,2"],
    "suite": ["none", ""],
    "coordinator": ["localhost:1", ""],
    "stop": ["a", "", "\n", "caf\udce9"],
    "bad_words": ["a", "", "e", "caf\udce9"],
}  # fmt: skip
# What is meant: for each folder of a run the samplers that fit it, None for its own.
CANVAS = ("confidence", "threshold", "factor", "entropy_bound", "ancestral")
REMASK = ("remask_cap", "remask_rescale", "remask_confidence", "remask_loop")
LEFT_TO_RIGHT = (None, "autoregressive", "speculative")
FITS = {
    "work": (*LEFT_TO_RIGHT, *CANVAS, *REMASK),
    "converted": (None, "published", "autoregressive", "speculative"),
    "ar": LEFT_TO_RIGHT,
    "masked": (None, *CANVAS, *REMASK),
    "block": (None, *CANVAS),
    "uniform": (None, "ancestral", "renoise"),
    "joint_uniform": (None, "ancestral", "renoise", "autoregressive"),
    "embedding": (None, "embedding_flow"),
}
DRAWN = ("ar", "masked", "block", "uniform", "joint_uniform", "embedding")  # kinds that no other test has trained
NO_INFILL = ("converted", "ar")
ALWAYS = ["prompt", "seed", "temperature", "top_k", "top_p", "min_p", "frequency_penalty",
          "bad_words", "no_repeat_ngram_size", "ignore_eos", "verbosity"]  # fmt: skip
WAYS = {  # of sampling: flags that begin it, and flags that go with it
    "one": ([], ["num_samples", "stop", "rolling_context", "drop_finished", "cfg_scale", "out", "prompt"]),
    "infill": (["infill"], ["out", "infill"]),
    "best_of": (["best_of"], ["best_of_score", "stop", "cfg_scale", "drop_finished", "out"]),
    "stream": (["stream"], ["stop", "cfg_scale", "out"]),
    "view": (["view"], ["num_samples", "stop", "cfg_scale", "out"]),
    "particles": (["num_particles"], ["stop", "out"]),
    "corpus": (["corpus"], ["num_samples", "stop", "batch_size", "prompts_file", "drop_finished"]),
}
NEEDS = {"revise_span": "revise_rounds", "cache_block_size": "approximate_cache",
         "cache_refresh_every": "approximate_cache", "prompts_file": "out"}  # fmt: skip
APART = {"prompts_file": "prompt", "approximate_cache": "revise_rounds", "infill": "prompt"}
GOOD = {
    "prompt": ["Line 3: the cat", "Line ", "", "the dog sat on the mat.", "cat\n\nLine"],
    "infill": ["Line [[3]]: the", "Line [[2]]: the [[4]] sat", "[[5]]", "Line [[2-3]] the"],
    "max_new_tokens": ["1", "4", "16", "17", "33"], "num_samples": ["1", "2", "3"], "best_of": ["2", "3"],
    "temperature": ["0", "0.5", "1", "1.5"], "top_k": ["0", "1", "2", "17"], "top_p": ["0.1", "0.9", "1"],
    "frequency_penalty": ["0.1", "1", "3"], "no_repeat_ngram_size": ["1", "2", "3", "4"],
    "cfg_scale": ["0", "0.5", "3"],
    "bad_words": ["a", "e", "Li"], "stop": ["a", "at", "\n", "Line"],
    "out": ["@new/out.json"], "view": ["terminal", "@new/page.html"], "seed": ["0", "7", "4294967295"],
    "canvas_length": ["0", "1", "4", "16"], "denoising_steps": ["1", "2", "3", "17"], "num_particles": ["2", "3"],
    "revise_rounds": ["1", "2"], "revise_span": ["1", "2", "4"], "cache_block_size": ["1", "16", "32"],
    "batch_size": ["1", "2", "3", "16"], "noise_draws": ["1", "2", "4"], "seq_len": ["2", "16", "33", "64"],
    "data": ["@text.txt", "@records.jsonl"], "verbosity": ["0", "1"], "corrector_steps": ["0", "1"],
    "churn": ["0", "0.5"],
    "prompts_file": ["@prompts.txt", "@prompts.jsonl"], "drafter": ["lookup", "masked"], "what": ["train", "sample"],
    "by_difficulty": ["true", "false"], "dtype": ["stored", "bfloat16", "float32"], "score": ["margin", "entropy"],
    "set": ["seed=3", "optim.lr=1e-4", "train.grad_accum_steps=2", "train.ema_decay=0.9", "train.eval_every=1",
            "train.batch_size=6", "train.steps_per_call=2", "model.kv_heads=1", "data.val_fraction=0.3",
            "data.document_unit=line", "checkpoint.save_every=1", "exec.compute_dtype=float32"],
}  # fmt: skip
KINDS = [kind for kind in tinyshakespeare.KINDS if not kind.startswith("distilled")]  # those need a teacher
SMALLEST = ("model.width=16", "model.layers=1", "model.heads=2", "data.tokenizer_kind=char", "data.seq_len=64",
            "train.batch_size=4", "train.eval_every=0", "train.eval_batches=1", "checkpoint.save_every=2",
            "data.path=@text.txt", "train.steps=2")  # fmt: skip
MEANT = {  # launcher: flags that are always there, flags that may be
    "evaluate": ([], ["data", "noise_draws", "batch_size", "seq_len", "documents", "verbosity"]),
    "convert source": (["--source=@llama", "--workdir=@new/run"], ["dtype"]),
    "convert export": (["--workdir=@converted", "--export=@new/export"], ["verbosity"]),
    "planning.rescore": (["--experiment=sudoku4-ar", "--predictions=@predictions.jsonl"], ["by_difficulty"]),
    "train": (["--workdir=@new/run"], ["set", "set", "verbosity"]),
    "quickstart": (["--workdir=@new/run", "--boards=3", *(f"--set={s}" for s in (
        *SMALLEST, "data.seq_len=512", "objective.block_size=256"))], ["verbosity"]),
    "compile": (["--topology=cpu:1"], ["what", "batch_size", "denoising_steps", "out", "set"]),
    "planning.scoreboard": (["--workdir=@new/run", "--budget=0", "--examples=2", "--kinds=ar", "--denoising_steps=2",
        *(f"--set={s}" for s in (*SMALLEST[:3], "train.steps=2", "train.batch_size=4", "checkpoint.save_every=2",
                                 "data.valid=2"))], ["verbosity"]),
}  # fmt: skip
MEANT_WEIGHTS = ("sample",) * 12 + ("evaluate",) * 5 + ("convert source", "convert export") + ("planning.rescore",) * 3
MEANT_WEIGHTS += ("train",) * 4 + ("quickstart", "compile", "planning.scoreboard") if NUMBER else ()
FEW = {"max_new_tokens", "num_samples", "best_of", "num_particles", "noise_draws", "revise_rounds", "canvas_length",
       "boards"}  # fmt: skip
FEW_OF = {"max_new_tokens": ["1", "4", "17", "33", "63", "64", "0", "x"], "canvas_length": ["0", "1", "3", "16", "50",
          "65", "-1"]}  # fmt: skip


def lines():
    """(launcher, arguments, whether it is meant), with paths that begin with '@' where the test's folder belongs."""
    return st.one_of(meant(), meant(), random()) if NUMBER else st.one_of(meant(), *[random()] * 4)


@st.composite
def meant(draw):
    what = draw(st.sampled_from(MEANT_WEIGHTS))
    name = what.partition(" ")[0]
    flags = importlib.import_module(f"launch.{name}").FLAGS.values
    arguments, may = _sample(draw) if name == "sample" else MEANT[what]
    arguments = list(arguments)
    if name == "evaluate":
        arguments.append(f"--workdir=@{draw(st.sampled_from(list(FITS)))}")
    if name in ("train", "compile"):
        arguments.append(f"--config=configs/tinyshakespeare.py:{draw(st.sampled_from(KINDS))}")
        arguments += [f"--set={s}" for s in SMALLEST]
    chosen = draw(st.lists(st.sampled_from(may), min_size=min(2, len(may)), max_size=5))
    if "documents" in chosen:
        chosen = ["data", *(n for n in chosen if n not in ("data", "documents"))]
        arguments.append("--documents=@new/documents.jsonl")
    given = {argument[2:].partition("=")[0] for argument in arguments}
    chosen = [n for n in chosen if n not in given or n in ("set", "infill")]
    for n in list(chosen):
        if n in NEEDS and NEEDS[n] not in given | set(chosen):
            chosen.append(NEEDS[n])
        chosen = [other for other in chosen if other != APART.get(n)]
    arguments += [draw(good(flags[n])) for n in dict.fromkeys(chosen)]
    arguments += [draw(good(flags[n])) for n in chosen if n in ("prompt", "set")]  # may be repeated
    if draw(st.integers(0, 5)) == 3:
        kept = set() if name in ("sample", "evaluate") else {"workdir"}  # what is begun writes into another's
        arguments.append(draw(argument(flags[draw(st.sampled_from(sorted(set(flags) - LEFT_OUT - kept)))], own=False)))
    return name, arguments, True


def _sample(draw):
    """Flags that are always there, and those that may be, of a way to sample that fits a run."""
    way = draw(st.sampled_from(list(WAYS)))
    run = draw(st.sampled_from(["work"] * 5 + list(FITS)))
    sampler = draw(st.sampled_from(FITS[run]))
    if way == "particles":
        run, sampler = "work", "ancestral"
    kind = sampler_flags.SAMPLERS.get(sampler)
    if way == "infill" and (run in NO_INFILL or sampler in ("autoregressive", "speculative")):
        way = "best_of"
    if way == "view" and not (kind and kind.records and run in ("work", "masked", "block")):
        way = "one"
    begin, may = WAYS[way]
    begin = [draw(good(sample.FLAGS.values[n])) if n != "corpus" else "--out=@new/corpus.jsonl" for n in begin]
    taken = kind.flags if kind else ()
    apart = {"one": (), "view": ()}.get(way, ("num_particles", "revise_rounds", "revise_span"))
    cached = () if run == "masked" else ("approximate_cache", "cache_block_size", "cache_refresh_every")
    apart = {*apart, *(("temperature", "top_k", "top_p", "min_p") if way == "particles" else ())}
    left_out = {*apart, *cached, "num_particles", "sampler_setting", *(["prompt"] if way == "infill" else [])}
    may = sorted({*ALWAYS, *taken, *may} - left_out - {"corrector_steps" if run in ("work", "masked", "block") else ""})
    most = draw(good(sample.FLAGS.values["max_new_tokens"]))
    return [f"--workdir=@{run}", most, *([f"--sampler={sampler}"] if sampler else []), *begin], may


def good(flag):
    name, kind = flag.name, flag.flag_type()
    if name in GOOD:
        return st.sampled_from(GOOD[name]).map(lambda value: f"--{name}={value}")
    if kind == "bool":
        return st.just(f"--{name}")
    if hasattr(flag.parser, "enum_values"):
        return st.sampled_from(flag.parser.enum_values).map(lambda value: f"--{name}={value}")
    return st.sampled_from(["1", "2", "3"] if kind == "int" else ["0.1", "0.5", "0.9"]).map(lambda v: f"--{name}={v}")


@st.composite
def random(draw):
    name = draw(st.sampled_from(WEIGHTS))
    flags = importlib.import_module(f"launch.{name}").FLAGS
    required = sorted(flags._required)
    names = [n for n in required if draw(st.integers(0, 9))]
    optional = sorted(set(flags.values) - LEFT_OUT - set(required))
    names += draw(st.lists(st.sampled_from(optional), max_size=4 if NUMBER else 2))
    arguments = [draw(argument(flags.values[n], own=n in required)) for n in names]
    if name == "benchmark":
        arguments = ["--charts=@charts", *arguments]
    if name in ("train", "quickstart", "compile") and draw(st.integers(0, 9)):
        arguments = [*(f"--set={s}" for s in (*SMALL, "data.path=@text.txt", "train.steps=2")), *arguments]
    return name, [*arguments, *draw(st.sampled_from([[]] * 9 + [["stray"], ["--none=1"], ["--workdir"]]))], False


@st.composite
def argument(draw, flag, own):
    name, kind = flag.name, flag.flag_type()
    if name in PATHS:
        path = draw(st.sampled_from(PATHS[name][:1] * (16 if own else 4) + PATHS[name]))
        whole = name != "config" and path and not path.startswith(("package:", "python-", "terminal"))
        return f"--{name}={'@' if whole else ''}{path}"
    if name in CHOICES:
        return f"--{name}={draw(st.sampled_from(CHOICES[name]))}"
    if kind == "bool":
        return draw(st.sampled_from([f"--{name}", f"--no{name}", f"--{name}=x", f"--{name}=true"]))
    if kind == "int":
        few = FEW_OF.get(name, SMALL_INTEGERS if name in FEW else INTEGERS)
        return f"--{name}={draw(st.sampled_from(few))}"
    if kind == "float":
        return f"--{name}={draw(st.sampled_from(FLOATS))}"
    if kind == "string enum" or hasattr(flag.parser, "enum_values"):
        return f"--{name}={draw(st.sampled_from([*flag.parser.enum_values, 'none', '']))}"
    return f"--{name}={draw(st.sampled_from(TEXTS))}"
