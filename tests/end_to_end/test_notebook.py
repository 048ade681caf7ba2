"""The notebooks run with small parameters on a CPU, and again in the same kernel."""

import os
from pathlib import Path

import pytest

from launch.benchmarks.loading import CONFIG, write_synthetic

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
QUICKSTART, OPEN_WEIGHTS, ADAPT, PLAN = (
    ROOT / f"colabs/{name}.ipynb" for name in ("quickstart", "open_weights", "adapt", "plan")
)
SMALL = [
    "train.steps=4",
    "train.batch_size=2",
    "train.log_every=1",
    "data.seq_len=64",
    "data.vocab_size=300",
    "objective.block_size=16",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "model.mlp_dim=16",
    "optim.schedule.warmup=1",
    "checkpoint.save_every=4",
]


def parameters(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def outputs(notebook, kind):
    """Everything that cells showed as `kind`, a mime type, or printed."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and kind == "text":
                yield output.text
            if kind in output.get("data", {}):
                yield output.data[kind]


def replaced(path, given):
    """The notebook with these parameters in place of its own, and nothing else changed."""
    notebook = nbformat.read(path, as_version=4)
    names = {line.split(" = ")[0] for line in parameters(notebook).source.splitlines()}
    assert names == given.keys()
    parameters(notebook).source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    return notebook


def run(notebook, folder, monkeypatch):
    """Executes all cells twice in one kernel; the outputs are the second time's."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel(env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}):
        for _ in range(2):
            for i, cell in enumerate(notebook.cells):
                client.execute_cell(cell, i)
            yield "\n".join(outputs(notebook, "text"))


@pytest.fixture
def small(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} green bottles hang on wall {i % 7}, and {i * i} more" for i in range(200)))
    given = {
        "WORKDIR": str(tmp_path / "run"),
        "SETTINGS": [*SMALL, f"data.path={text}", "data.document_unit=paragraph"],
        "PROMPT": "7 green",
        "MAX_NEW_TOKENS": 24,
        "DENOISING_STEPS": 3,
    }
    return replaced(QUICKSTART, given)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert any(cell.cell_type == "markdown" for cell in notebook.cells)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_quickstart_runs_and_runs_again_on_the_finished_run(small, tmp_path, monkeypatch):
    first, second = run(small, tmp_path, monkeypatch)
    assert "4 steps; nothing was left to do" not in first and "4 steps; nothing was left to do" in second
    for said in (first, second):
        assert "--- autoregressive" in said and "--- diffusion" in said
        assert said.count("7 green") == 2
    (picture,) = outputs(small, "image/svg+xml")
    assert "causal" in picture and "canvas" in picture
    (page,) = [shown for shown in outputs(small, "text/html") if "<iframe" in shown]
    assert "srcdoc=" in page and "7 green" in page
    assert (tmp_path / "run/canvas.html").is_file()


@pytest.mark.cases(0)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_open_weights_runs_twice(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="the tokenizers package is not installed: pip install -e '.[test]'")
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    write_synthetic(tmp_path / "model", CONFIG | sizes | {"num_key_value_heads": 1, "num_hidden_layers": 1})
    given = {
        "SOURCE": str(tmp_path / "model"),
        "QUESTION": "What?",
        "PARAGRAPH": "a b c a b c",
        "MAX_NEW_TOKENS": 8,
        "LARGE": "",
    }
    for said in run(replaced(OPEN_WEIGHTS, given), tmp_path, monkeypatch):
        assert "1 layers of width 32, 96 tokens" in said
        assert said.count("--- autoregressive") == 2 and said.count("--- speculative") == 1
        assert "as it stands: -" in said and "backwards: -" in said


@pytest.mark.cases(0)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_adapt_runs_twice_and_drafts_leave_the_text_as_it_is(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} green bottles hang on wall {i % 7}, and {i * i} more" for i in range(200)))
    few = ["train.steps=2", "train.batch_size=2", "train.log_every=1"]
    own = ["data.seq_len=64", "data.vocab_size=300", "data.document_unit=paragraph", "model.width=16", "model.layers=1"]
    given = {
        "WORKDIR": str(tmp_path / "run"),
        "TEXT": str(text),
        "CAUSAL": [*few, *own, "model.heads=2"],
        "DRAFTS": [*few, *own[:3], "trainable.rank=2"],
        "CANVASES": [*few, *own[:3], "objective.block_size=8"],
        "PROMPT": "7 green",
        "MAX_NEW_TOKENS": 12,
        "DENOISING_STEPS": 2,
    }
    notebook = replaced(ADAPT, given)
    for again, said in enumerate(run(notebook, tmp_path, monkeypatch)):
        assert said.count("nothing was left to do") == (3 if again else 0)
        assert "--- autoregressive" in said and "--- speculative" in said and "the texts are the same" in said
        assert "--- canvases" in said
    marked, page = outputs(notebook, "text/html")
    assert "7 green" in marked and "srcdoc=" in page


@pytest.mark.cases(0)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_plan_runs_twice_and_counts_what_is_solved(tmp_path, monkeypatch):
    network = ["model.width=16", "model.layers=1", "model.heads=2", "model.mlp_dim=16"]
    given = {
        "WORKDIR": str(tmp_path / "run"),
        "TASK": "sudoku4",
        "SETTINGS": ["train.steps=2", "train.batch_size=2", "checkpoint.save_every=2", *network],
        "NUM_BOARDS": 4,
        "DENOISING_STEPS": [1, 2],
    }
    notebook = replaced(PLAN, given)
    for said in run(notebook, tmp_path, monkeypatch):
        assert said.count("of 4 boards solved") == 3 + 2
        assert "easy first: " in said and "95 % interval" in said
    (picture,) = outputs(notebook, "image/svg+xml")
    assert all(name in picture for name in ("easy first", "random order", "at once", "@keyframes s2"))
