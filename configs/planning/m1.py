"""Planning at 0.87M parameters, for two CPU cores. Argument: TASK-KIND, for example sudoku4-masked.

    python -m launch.train --config=configs/planning/m1.py:sudoku4-masked --workdir=runs/sudoku4-masked

Hardware: 2 CPU cores. sudoku4-masked: 1,200 updates in 1.5 to 3 minutes, 99 to 100 % solved in 16 denoising steps. More
results, with dates, and what was not run: docs/results/planning.md.
"""

from configs.planning import experiments
from diffusion_lm.config import Config
from diffusion_lm.models.base import DenoiserSpec


def get_config(experiment: str = "sudoku4-masked") -> Config:
    """experiment: TASK-KIND, of those in experiments.py."""
    return experiments.config(experiment, DenoiserSpec(width=128, layers=4, heads=4), steps=1200, batch=32, lr=2e-3)
