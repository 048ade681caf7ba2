"""launch.sample: texts, infilling, the best of several, and what it refuses."""

import json

import pytest
from support.commands import call, launch, result

from launch import evaluate, sample, train

QUICK = ("--canvas_length=16", "--denoising_steps=2", "--max_new_tokens=20")


def test_texts_a_result_file_a_page_and_a_profile(trained):
    folder, _ = trained
    page, out = folder / "canvas.html", folder / "out.json"
    done = launch(
        "sample", f"--workdir={folder}/work", "--prompt=Line", "--prompt=", "--max_new_tokens=20", "--canvas_length=16",
        "--denoising_steps=4",
        f"--view={page}", f"--out={out}", f"--profile={folder}/traced", home=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(out.read_text())
    assert [t["prompt"] for t in found["texts"]] == ["Line", ""]
    assert found["nfe"] <= 1 + 2 * 4 + 1  # the prompt, two canvases, the commit of the first
    assert "</html>" in page.read_text()
    assert list((folder / "traced").glob("plugins/profile/*/*.xplane.pb"))


def test_infill_best_of_and_logits_processors(trained, capsys):
    """Holes of one length and of several; the best of several texts with logits processors."""
    plain = [f"--workdir={trained[0]}/work", "--canvas_length=16", "--denoising_steps=2"]
    one = result(capsys, sample, *plain, "--infill=Line [[2]]: the cat", "--infill=Line [[3]] the dog")
    texts = [text["text"] for text in one["texts"]]
    assert texts[0].startswith("Line ") and texts[0].endswith(": the cat") and texts[1].endswith(" the dog")
    several = result(capsys, sample, *plain, "--infill=Line [[1-2]]: the cat")
    assert len(several["scores"][0]) == 2
    best = result(
        capsys, sample, *plain, "--prompt=Line", "--max_new_tokens=20", "--best_of=3", "--best_of_score=elbo",
        "--cfg_scale=1", "--bad_words=a", "--no_repeat_ngram_size=4", "--frequency_penalty=0.1",
    )  # fmt: skip
    assert len(best["scores"][0]) == 3 and len(best["texts"]) == 1 and "a" not in best["texts"][0]["text"]


def test_a_corpus_of_its_own_texts(capsys, trained, tmp_path):
    """Twice from each line of a file; the same command again has nothing to do."""
    (tmp_path / "prompts.txt").write_text("Line\nThe\n")
    command = [f"--workdir={trained[0]}/work", "--sampler=autoregressive", "--max_new_tokens=6", "--num_samples=2"]
    command += [f"--prompts_file={tmp_path}/prompts.txt", f"--out={tmp_path}/corpus.jsonl", "--batch_size=4"]
    for new in (4, 0):
        status, out, err = call(capsys, sample, *command)
        assert status == 0, err
        assert (json.loads(out)["rows"], json.loads(out)["new"]) == (4, new)
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Line", "Line", "The", "The"]
    assert rows[0]["completion"] != rows[1]["completion"]


def sampled(capsys, trained, *arguments) -> dict:
    return result(capsys, sample, f"--workdir={trained[0]}/work", *QUICK, *arguments)


def test_a_text_ends_before_a_stop_string(trained, capsys):
    full = sampled(capsys, trained, "--prompt=Line", "--ignore_eos")
    text = full["texts"][0]["text"]
    assert full["tokens"] == [20]  # whatever is likely, an end of text isn't sampled
    stops = [text[7:9], text[12:15]]
    cut = sampled(capsys, trained, "--prompt=Line", "--ignore_eos", *(f"--stop={stop}" for stop in stops))
    assert cut["texts"][0]["text"] == text[: min(text.index(stop) for stop in stops)]
    assert cut["tokens"] == full["tokens"]


def test_a_stream_prints_the_text(trained, capsys):
    arguments = (f"--workdir={trained[0]}/work", *QUICK, "--prompt=Line", "--ignore_eos")
    status, out, err = call(capsys, sample, *arguments, "--stream")
    found = json.loads(out.splitlines()[-1])
    assert status == 0 and found["texts"][0]["text"] in err and found["tokens"] == [20]
    assert found["texts"] == sampled(capsys, trained, "--prompt=Line", "--ignore_eos")["texts"]


def test_several_samples_a_prompt_and_a_vote(trained, capsys):
    four = sampled(capsys, trained, "--prompt=Line", "--prompt=The", "--num_samples=2")
    assert [text["prompt"] for text in four["texts"]] == ["Line", "Line", "The", "The"]
    vote = sampled(capsys, trained, "--prompt=Line", "--best_of=3", "--best_of_score=vote", "--temperature=0")
    assert vote["shares"] == [1.0] and len(vote["texts"]) == 1


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--sampler=entropy_bound", "--entropy_bound=1"],
        ["--score=margin"],
        ["--sampler=remask_cap", "--eta=0.1", "--revise_rounds=1", "--revise_span=2"],
        ["--sampler=ancestral", "--num_particles=2"],
        ["--rolling_context", "--drop_finished"],
    ],
    ids=" ".join,
)
def test_each_flag_reaches_its_sampler(arguments, trained, capsys):
    result = sampled(capsys, trained, "--prompt=Line 1", *arguments)
    assert 0 < result["nfe"] <= 60 and 0 <= result["tokens"][0] <= 20


@pytest.mark.parametrize(
    ("launcher", "arguments", "cause"),
    [
        (sample, ["--infill=no hole"], "has no hole"),
        (sample, ["--infill=[[3]]", "--rolling_context"], "--infill goes without"),
        (sample, ["--approximate_cache=dual"], "exact cache"),
        (sample, ["--sampler=renoise"], "Absorbing is other noise: use confidence"),
        (sample, ["--workdir=nowhere"], "no checkpoint"),
        (sample, ["--compile_cache=setup.py"], "--compile_cache="),
        (sample, ["--view=canvas.pdf"], "--view is terminal or FILE.html"),
        (sample, ["--view=terminal", "--sampler=auto"], "--view shows"),
        (sample, ["--sampler=confidense"], "did you mean confidence? It is one of"),
        (sample, ["--stream", "--num_samples=2"], "--stream prints one text"),
        (sample, ["--stream", "--out=texts.jsonl"], "--stream prints one text"),
        (sample, ["--num_shards=2"], "--num_shards and --shard_index go together"),
        (sample, ["--num_shards=2", "--shard_index=2", "--out=a.jsonl"], "--shard_index=2 is none of 0 to 1"),
        (sample, ["--best_of=1"], "--best_of is at least 2"),
        (sample, ["--best_of_score=vote"], "goes with --best_of"),
        (sample, ["--stop="], "--stop is a string"),
        (sample, ["--out=nowhere/out.json"], "its folder doesn't exist"),
        (sample, ["--seed=-1"], "--seed=-1"),
        (evaluate, ["--data=missing.txt"], "missing.txt"),
        (evaluate, ["--batch_size=0"], "--batch_size=0"),
        (train, ["--config=configs/quickstart.py", "--set=optim.rate=1"], "optim.lr"),
        (train, ["--config=missing.py"], "missing.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_leaves_the_workdir_alone(trained, capsys, launcher, arguments, cause):
    work = trained[0] / "work"
    before = sorted(work.rglob("*"))
    status, out, err = call(capsys, launcher, f"--workdir={work}", *arguments)
    assert status == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and cause in err
    assert sorted(work.rglob("*")) == before
