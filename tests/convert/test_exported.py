"""Exported folders, loaded by the library that most people load them with."""

import numpy as np
import pytest
from support import parity
from support.sources import write_source

from diffusion_lm.build import load_for_inference
from diffusion_lm.convert.loading import export, load_source, save

torch = pytest.importorskip("torch", reason="transformers is not installed: pip install torch transformers")
transformers = pytest.importorskip("transformers", reason="it is not installed: pip install torch transformers")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")
KNOWN = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "gpt2", "ministral3")


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
@pytest.mark.parametrize("family", KNOWN)
def test_transformers_computes_the_familys_logits_from_an_export(family, tmp_path):
    """Source, workdir, and a folder again; float32."""
    (tmp_path / "source").mkdir()
    write_source(tmp_path / "source", family)
    save(load_source(tmp_path / "source", dtype="float32"), tmp_path / "run")
    export(load_for_inference(tmp_path / "run"), tmp_path / "out")
    # Its grouped product of experts takes rows of 16 bytes only; the plain one takes any.
    plain = {"experts_implementation": "eager"} if family == "qwen3_moe" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **plain).float()
    io = parity.arrays(family)
    with torch.no_grad():
        found = model(torch.tensor(io["forward/input_ids"], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(found, io["forward/logits"], rtol=0, atol=3e-4)
