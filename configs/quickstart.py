"""A small joint model, autoregressive and diffusion, of the documentation that every Python installation carries.

    python -m launch.quickstart

3.8M parameters, canvases of 256 tokens, vocabulary 2,048, a tenth of the modules held out.
Hardware: 2 CPU cores. Time: under 3 minutes.
Number to expect, bits per byte: 2.556 autoregressive, at most 2.913 by diffusion (seed 0, 2026-11-21).
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupCosine


def get_config() -> Config:
    return Config(
        data=Data(path="python-docs", seq_len=512, val_fraction=0.1, tokenizer_kind="unigram", vocab_size=2048),
        model=DenoiserSpec(width=256, layers=4, heads=4),
        process=Absorbing(),
        objective=Joint(block_size=256),
        optim=AdamW(lr=2e-3, schedule=WarmupCosine(warmup=20, final=0.05)),
        train=Train(steps=200, batch_size=4, eval_every=0, log_every=10),
        checkpoint=Checkpointing(save_every=200),
    )
