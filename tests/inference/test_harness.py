"""The adapter to lm-eval: texts to requests, answers, the cache of requests; and the harness itself if installed."""

import importlib.util
import json
import types

import numpy as np
import pytest
from support.commands import call
from support.loaded import loaded

import diffusion_lm as dlm
from diffusion_lm.inference import harness, scoring
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.elbo import ELBO

PAIRS = [("ab", "c"), ("ab", " de"), ("ab ", "de"), ("", "fg"), ("gfe", "dcb")]


def requests(arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def plain(model, context, continuation):
    """log p of ids, from our logits alone."""
    request = scoring.Request((9, *model.tokenizer.encode(context)), tuple(model.tokenizer.encode(continuation)))
    return dict(scoring.score(model, [request], draws=4))[0]


# ---- likelihoods ----


@pytest.mark.parametrize("objective", [AutoregressiveLoss(), ELBO()], ids=["ar", "canvas"])
def test_a_pair_is_scored_as_its_tokens_and_spaces_between_are_the_continuations(objective):
    model = loaded(objective)
    lm = harness.DiffusionLM(model, draws=4)
    found = lm.loglikelihood(requests(PAIRS))
    want = [plain(model, *pair) for pair in [("ab", "c"), ("ab", " de"), ("ab", " de"), ("", "fg"), ("gfe", "dcb")]]
    assert [log_prob for log_prob, _ in found] == pytest.approx([one.log_prob for one in want], abs=1e-5)
    assert [greedy for _, greedy in found] == [one.greedy for one in want]


def test_a_text_longer_than_the_context_is_the_sum_of_its_windows():
    model = loaded(AutoregressiveLoss(), context=8)
    text = "abc abd abe abf abg"
    (found,) = harness.DiffusionLM(model).loglikelihood_rolling(requests([(text,)]))
    windows = scoring.windows(model, model.tokenizer.encode(text), 9)
    assert len(windows) == 3
    assert found == pytest.approx(sum(one.log_prob for _, one in scoring.score(model, windows)), abs=1e-5)
    assert harness.DiffusionLM(model).loglikelihood_rolling(requests([("",)])) == [0.0]


def test_a_long_context_is_cut_from_the_left_and_counted():
    lm = harness.DiffusionLM(loaded(AutoregressiveLoss(), context=8))
    long, short = lm.loglikelihood(requests([("abcdefgabcdefg", "ab"), ("abcdefg", "ab")]))
    assert long == short
    assert lm.get_model_info()["requests"]["loglikelihood"]["truncated_contexts"] == 2


# ---- answers ----


@pytest.mark.parametrize("sampler", ["autoregressive", "confidence"])
def test_answers_are_those_of_generate_at_all_batch_sizes_and_end_at_stop_strings(sampler):
    model = loaded(AutoregressiveLoss() if sampler == "autoregressive" else ELBO())
    options = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "until": "a"}
    asked = requests([(prompt, options) for prompt in ("ab", "cd", "fg", "ab")])
    answers = []
    for size in (1, 16):
        answers.append(harness.DiffusionLM(model, sampler=sampler, seed=3, batch_size=size).generate_until(asked))
    assert answers[0] == answers[1]
    alone = dlm.generate(model, "cd", sampler=sampler, seed=3, max_new_tokens=8, temperature=0.7).text
    assert answers[0][1] == alone.partition("a")[0]
    again = dlm.generate(model, "ab", sampler=sampler, seed=4, max_new_tokens=8, temperature=0.7).text
    assert answers[0][3] == again.partition("a")[0]  # a repeated request draws anew


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"num_beams": 4}, "generation_kwargs num_beams"), ({"max_gen_toks": 24}, "no room for a prompt")],
)
def test_options_that_would_be_ignored_are_refused(options, cause):
    with pytest.raises(ValueError, match=cause):
        harness.DiffusionLM(loaded(AutoregressiveLoss())).generate_until(requests([("a", options)]))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"sampler": "auto"}, "name another"),
        ({"batch_size": "auto"}, "batch_size must be an integer"),
        ({"device": "cuda"}, "leave them out"),
        ({"sampler": "confidence"}, "trains no canvases"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, cause):
    with pytest.raises(ValueError, match=cause):
        harness.DiffusionLM(loaded(AutoregressiveLoss()), **options)


# ---- the cache of requests ----


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, path, score = loaded(ELBO()), tmp_path / "cache.jsonl", scoring.score
    want = harness.DiffusionLM(model, draws=4).loglikelihood(requests(PAIRS))

    def killed(model, asked, **options):
        for number, found in enumerate(score(model, asked, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(scoring, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        harness.DiffusionLM(model, draws=4, request_cache=path).loglikelihood(requests(PAIRS))
    monkeypatch.setattr(scoring, "score", score)
    with path.open("a") as file:
        file.write('["0123", [-1.')  # and a line that was being written
    lm = harness.DiffusionLM(model, draws=4, request_cache=path)
    assert lm.loglikelihood(requests(PAIRS)) == want
    assert lm.get_model_info()["requests"]["loglikelihood"]["from_cache"] == 2
    other = harness.DiffusionLM(model, draws=6, request_cache=path)  # another setting
    other.loglikelihood(requests(PAIRS))
    assert other.get_model_info()["requests"]["loglikelihood"]["from_cache"] == 0
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="no cache of requests"):
        harness.DiffusionLM(model, request_cache=path)


# ---- lm-eval itself ----

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
output_type: {kind}
target_delimiter: ""
metric_list: {metrics}
"""
TASKS = {
    "choices": (
        "multiple_choice", "[{metric: acc}, {metric: acc_norm}]",
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"',
        [{"q": q, "c": [" de", "fg", "c"], "a": i % 3} for i, q in enumerate(["ab", "gfe", "c c", "e", "ab"])],
    ),
    "texts": (
        "loglikelihood_rolling", "[{metric: bits_per_byte}]", 'doc_to_text: ""\ndoc_to_target: "{{t}}"',
        [{"t": "abc abd"}, {"t": "gfe dcb " * 5}],
    ),
    "answers": (
        "generate_until", "[{metric: exact_match}]",
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\ngeneration_kwargs: {until: ["a"], max_gen_toks: 6}',
        [{"q": q, "a": "bb"} for q in ("ab", "c", "ef")],
    ),
}  # fmt: skip


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval isn't installed: pip install 'diffusion_lm[eval]'")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name, (kind, metrics, lines, documents) in TASKS.items():
        text = TASK.format(name=name, folder=tmp_path, kind=kind, metrics=metrics) + lines
        (tmp_path / f"{name}.yaml").write_text(text)
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
@pytest.mark.parametrize("objective", [AutoregressiveLoss(), ELBO()], ids=["ar", "canvas"])
def test_the_harness_reports_what_a_plain_script_computes(objective, tasks, capsys, monkeypatch):
    from launch import harness as launcher

    model, sampler = loaded(objective), "autoregressive" if objective.trains_ar else "confidence"
    monkeypatch.setattr(launcher.api, "load", lambda *_, **__: model)
    flags = f"--tasks={','.join(TASKS)}", f"--include_path={tasks}", f"--sampler={sampler}", "--noise_draws=4"
    results = []
    for size in (16, 1, 7, 16):
        out = f"--out={tasks}/{len(results)}.json"
        status, printed, err = call(capsys, launcher, "--workdir=x", *flags, f"--batch_size={size}", out)
        assert status == 0, err
        results.append(json.loads(printed.splitlines()[-1]))
    first, others = results[0], results[1:]
    for other in others:
        for task in TASKS:
            for metric, value in first["results"][task].items():
                assert other["results"][task][metric] == pytest.approx(value, abs=1e-6), metric
    documents = TASKS["choices"][3]
    log_probs = [[plain(model, d["q"], choice).log_prob for choice in d["c"]] for d in documents]
    right = [np.argmax(row) == d["a"] for row, d in zip(log_probs, documents, strict=True)]
    assert first["results"]["choices"]["acc,none"] == pytest.approx(np.mean(right), abs=1e-6)
    nats = bytes_ = 0
    for document in TASKS["texts"][3]:
        windows = scoring.windows(model, model.tokenizer.encode(document["t"]), 9)
        nats -= sum(one.log_prob for _, one in scoring.score(model, windows, draws=4))
        bytes_ += len(document["t"])
    want = nats / bytes_ / np.log(2)
    assert first["results"]["texts"]["bits_per_byte,none"] == pytest.approx(want, abs=1e-6)
    said = {"sampler": sampler, "seed": 0, "draws": 0 if objective.trains_ar else 4, "compute_dtype": "float32"}
    assert said.items() <= first.items()
    assert all(first["requests"][kind]["nfe_per_token"] > 0 for kind in first["requests"])
    assert len((tasks / "0.requests.jsonl").read_text().splitlines()) == 15 - 3 + 2 + 3  # one question comes twice


@pytest.mark.filterwarnings("ignore")
def test_its_own_command_line_knows_the_model(tasks, capsys, monkeypatch):
    monkeypatch.setattr(harness.api, "load", lambda workdir: loaded(AutoregressiveLoss()))
    command = (
        "lm-eval --model diffusion_lm --model_args workdir=x,sampler=autoregressive --tasks choices --batch_size 16"
    )
    monkeypatch.setattr("sys.argv", [*command.split(), "--include_path", str(tasks)])
    harness.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "|acc " in line]
    documents, model = TASKS["choices"][3], loaded(AutoregressiveLoss())
    right = [np.argmax([plain(model, d["q"], choice).log_prob for choice in d["c"]]) == d["a"] for d in documents]
    assert f"{np.mean(right):.4f}" in row


def test_what_the_command_line_passes_unasked_is_no_option():
    harness.DiffusionLM(loaded(AutoregressiveLoss()), device="cuda:0", max_batch_size=None)


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_one_line(tasks, capsys, monkeypatch):
    from launch import harness as launcher

    monkeypatch.setattr(launcher.api, "load", lambda *_, **__: loaded(AutoregressiveLoss()))
    status, _, err = call(capsys, launcher, "--workdir=x", "--tasks=no_such_task")
    assert status == 2 and err.splitlines()[-1].startswith("error: --tasks: there is no task no_such_task")


def test_without_the_package_the_launcher_names_it(capsys):
    from launch import harness as launcher

    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    status, _, err = call(capsys, launcher, "--workdir=x", "--tasks=a")
    assert status == 2 and "pip install 'diffusion_lm[eval]'" in err
