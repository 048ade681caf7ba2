"""Planning at 85M parameters, the published "base" (arXiv 2410.14157: 12 layers of width 768). Argument: TASK-KIND.

    python -m launch.train --config=configs/planning/m85.py:countdown4-masked --workdir=runs/countdown4-masked \
        --set=data.test=cd4_test.jsonl --set=data.workers=8

Batch and peak learning rate are the published ones. Not run yet.
"""

from configs.planning import experiments
from diffusion_lm.config import Config
from diffusion_lm.models.base import DenoiserSpec


def get_config(experiment: str = "countdown4-masked") -> Config:
    """experiment: TASK-KIND, of those in experiments.py."""
    return experiments.config(
        experiment, DenoiserSpec(width=768, layers=12, heads=12), steps=60_000, batch=1024, lr=3e-4
    )
