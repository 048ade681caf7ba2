"""The notebook runs with fewer steps on a CPU, and again on the finished run."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "colabs/quickstart.ipynb"
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


@pytest.fixture
def small(tmp_path):
    """The notebook with another cell of parameters, and nothing else changed."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} green bottles hang on wall {i % 7}, and {i * i} more" for i in range(200)))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = [*SMALL, f"data.path={text}", "data.document_unit=paragraph"]
    given = {
        "WORKDIR": str(tmp_path / "run"),
        "SETTINGS": settings,
        "PROMPT": "7 green",
        "MAX_NEW_TOKENS": 24,
        "DENOISING_STEPS": 3,
    }
    parameters(notebook).source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    return notebook


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert any(cell.cell_type == "markdown" for cell in notebook.cells)


def test_the_test_gives_every_parameter_and_no_other(small):
    def names(notebook):
        return {line.split(" = ")[0] for line in parameters(notebook).source.splitlines()}

    assert names(small) == names(nbformat.read(NOTEBOOK, as_version=4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_it_runs(small, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = nbclient.NotebookClient(small, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    said = "\n".join(outputs(small, "text"))
    assert "4 steps" in said
    assert "--- autoregressive" in said and "--- diffusion" in said
    assert said.count("7 green") == 2
    (picture,) = outputs(small, "image/svg+xml")
    assert "causal" in picture and "canvas" in picture
    (page,) = [shown for shown in outputs(small, "text/html") if "<iframe" in shown]
    assert "srcdoc=" in page and "7 green" in page
    assert (tmp_path / "run/canvas.html").is_file()
    training = [cell for cell in small.cells if "loop.run(" in cell.source or cell is parameters(small)]
    small.cells = training  # run again on the finished run
    client = nbclient.NotebookClient(small, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    assert "4 steps; nothing was left to do" in "\n".join(outputs(small, "text"))
