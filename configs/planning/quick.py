"""Sudoku 4 x 4 in two minutes, left to right and on a canvas, by one network: the second part of launch.quickstart.

    python -m launch.train --config=configs/planning/quick.py --workdir=runs/sudoku

The experiment sudoku4-joint of m1.py, 0.87M parameters, with Muon and a fixed count of masks in a third of the updates.
Hardware and number to expect: README.md.
"""

import dataclasses

from configs.planning import m1
from diffusion_lm.config import Config
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.optimizer import Muon, WarmupStableDecay

STEPS = 400


def get_config() -> Config:
    config = m1.get_config("sudoku4-joint")
    return dataclasses.replace(
        config,
        process=Absorbing(fixed_count=True),
        optim=Muon(lr=8e-3, schedule=WarmupStableDecay(warmup=20, decay=STEPS // 2)),
        train=dataclasses.replace(config.train, steps=STEPS, eval_every=0),
        checkpoint=Checkpointing(save_every=STEPS),
    )
