"""The most that five minutes on two CPU cores teach about Shakespeare's characters: ar, masked or joint.

    python -m launch.train --config=configs/speedrun.py:ar --workdir=runs/speedrun-ar --set=data.path=input.txt
    python -m launch.evaluate --workdir=runs/speedrun-ar

The text is that of configs/tinyshakespeare.py, whose last tenth is held out. What each piece brought and how many nats
came out: docs/results/speedrun.md. `adamw` after the kind, as in `ar-adamw`, is the same run without Muon.
Hardware: 2 cores of an AMD EPYC with AVX512-BF16. Matrix products are in the type that the processor multiplies faster.
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.nn.specs import Execution
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.sharding import fast_dtype
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, Muon, WarmupStableDecay

KINDS = {"ar": (AutoregressiveLoss(), 3500), "masked": (ELBO(), 3700), "joint": (Joint(block_size=16), 2200)}


def get_config(kind: str = "ar") -> Config:
    """kind: one of KINDS, or one of them and "-adamw"."""
    name, _, without = kind.partition("-")
    if name not in KINDS or without not in ("", "adamw"):
        raise ValueError(f"speedrun: kind {kind!r} is none of {', '.join(KINDS)}, nor one of them and -adamw")
    objective, steps = KINDS[name]
    optimizer = AdamW if without else Muon
    return Config(
        data=Data(
            path="tinyshakespeare.txt",
            seq_len=256 if objective.layout.denoises else 257,  # a row's first character is given and not scored
            val_fraction=0.1,
            tokenizer_kind="char",
            vocab_size=512,
        ),
        model=DenoiserSpec(width=128, layers=4, heads=4),
        exec=Execution(compute_dtype=fast_dtype()),
        process=Absorbing(fixed_count=True),
        objective=objective,
        optim=optimizer(lr=8e-3, schedule=WarmupStableDecay(warmup=60, decay=steps // 2, final=0.0)),
        train=Train(steps=steps, batch_size=4, steps_per_call=2, eval_every=0, eval_batches=20),
        checkpoint=Checkpointing(save_every=steps),
    )
