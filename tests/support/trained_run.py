"""One small joint network, trained by the launcher once a session."""

import json
from pathlib import Path

import pytest

from support.commands import SMALL, TEXT, launch


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    """The folder with text.txt and work, and the result of launch.train."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    settings = [f"--set={s}" for s in (*SMALL, f"data.path={folder}/text.txt")]
    kept = f"--profile={folder}/profile", f"--compile_cache={folder}/programs"
    done = launch("train", "--config=configs/quickstart.py", f"--workdir={folder}/work", *settings, *kept, home=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def model(trained):
    """The trained run, loaded."""
    from diffusion_lm.build import load_for_inference

    return load_for_inference(trained[0] / "work")
