"""Every part of the user's own.

python -m launch.train --config=tests/extension_example/config.py --workdir=runs/mine
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from extension_example.data import Sums, Utf8
from extension_example.momentum import Momentum
from extension_example.noise import Erasing, MaskGIT


def get_config() -> Config:
    return Config(
        data=Data(path=Sums(below=12), tokenizer=Utf8(), seq_len=16),
        model=DenoiserSpec(width=16, layers=1, heads=2, mlp_dim=16),
        process=Erasing(),
        objective=MaskGIT(),
        optim=Momentum(),
        train=Train(steps=6, batch_size=4, eval_every=0, eval_batches=2, log_every=1, ema_decay=0.5),
        checkpoint=Checkpointing(save_every=2),
    )
