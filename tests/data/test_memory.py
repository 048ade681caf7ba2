"""A long text takes at most three times its size in memory, its tokens included."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_lm.data.tokenizer import train_tokenizer

SIZE = 12_000_000
LINE = "the cat sat on the mat with a hen\n"
# A token a character takes twice an ASCII text's size. One emoji makes each character of a string take four bytes.
TEXTS = {
    "one emoji": "😀\n" + LINE * (SIZE // len(LINE)),
    "latin": "café au lait déjà vu\n" * (SIZE // 24),
    "one line": "thecatsatonthemat" * (SIZE // 17),
}
MEASURE = """
import re, sys
from diffusion_lm.data.source import Data
from diffusion_lm.layouts import NoCanvas

def memory(name):
    with open("/proc/self/status") as status:
        return int(re.search(name + r":\\s*(\\d+) kB", status.read())[1]) * 1024

def tokens(path):
    parts = Data(path=path, tokenizer=sys.argv[3]).open(NoCanvas())
    return parts.train.targets + parts.valid.targets

tokens(sys.argv[1])
before = memory("VmRSS")
print(tokens(sys.argv[2]), memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", TEXTS)
def test_memory_of_a_long_text(name, tmp_path):
    text = TEXTS[name]
    small, large, model = (tmp_path / file for file in ("small.txt", "large.txt", "char.model"))
    small.write_text(text[:5000])
    large.write_text(text)
    model.write_bytes(train_tokenizer([text[:5000]], vocab=400, kind="char").proto)
    done = subprocess.run([sys.executable, "-c", MEASURE, small, large, model], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    targets, taken = map(int, done.stdout.split())
    assert targets == len(text) + 2  # two parts, each with an end of text
    assert 2 * len(text) * 0.9 < taken <= 3 * large.stat().st_size
