"""Planning at 5.4M parameters, the published "tiny" (arXiv 2410.14157: 3 layers of width 384). Argument: TASK-KIND.

    python -m launch.train --config=configs/planning/m6.py:countdown4-masked --workdir=runs/countdown4-masked \
        --set=data.test=cd4_test.jsonl --set=data.workers=8

Batch and peak learning rate are the published ones. Not run yet.
"""

from configs.planning import experiments
from diffusion_lm.config import Config
from diffusion_lm.models.base import DenoiserSpec


def get_config(experiment: str = "sudoku9-masked") -> Config:
    """experiment: TASK-KIND, of those in experiments.py."""
    return experiments.config(experiment, DenoiserSpec(width=384, layers=3, heads=6), steps=40_000, batch=1024, lr=1e-3)
