"""Installs diffusion_lm together with its configs and launchers."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    "hypothesis>=6",
    "safetensors>=0.4",
    "nbclient>=0.10",
    "nbformat>=5",
    "ipykernel>=6",
]
# Other people's weights: their tokenizers (pure Rust wheels), chat templates, and llama.cpp's files.
OPEN = ["tokenizers>=0.21", "jinja2>=3.1", "gguf>=0.17"]
# Starlette without FastAPI: requests are checked by hand, in one line an error, and pydantic isn't needed.
SERVE = ["starlette>=0.40", "uvicorn>=0.30"]
# The server's tests: OpenAI's own client, plain requests, and a socket to a browser that is already there.
CLIENTS = ["openai>=1.50", "httpx>=0.27", "websockets>=13"]
VIZ = ["matplotlib>=3.8", "tensorboardX>=2.6"]

setup(
    name="diffusion_lm",
    version="0.1.0",
    description="Train, sample and understand diffusion language models in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["diffusion_lm", "diffusion_lm.*", "configs", "configs.*", "launch", "launch.*"]),
    package_data={"diffusion_lm.visualize": ["*.html"], "diffusion_lm.serving": ["*.html"]},
    install_requires=[
        "jax>=0.10.0",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.0",
        "sentencepiece>=0.2.1",
        "absl-py>=2.1",
        "grain>=0.2.18",
        "rich>=13",
    ],
    extras_require={
        "test": TEST + VIZ + OPEN + SERVE + CLIENTS,
        "serve": SERVE,
        "open": OPEN,
        "viz": VIZ,
        "eval": ["lm-eval>=0.4.9"],  # datasets, pandas, scikit-learn: no torch
        "tpu": ["jax[tpu]>=0.10.0"],
        "aot": ["jax[tpu]>=0.10.0"],  # the libtpu that goes with this JAX: enough to compile for TPUs
        "cuda": ["jax[cuda13]>=0.10.0"],
        "bench": ["torch>=2.6", "transformers>=4.50"],
    },
)
