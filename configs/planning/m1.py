"""Planning at 0.87M parameters, for two CPU cores: TASK-KIND as the argument, sudoku4-masked for example.

    python -m launch.train --config=configs/planning/m1.py:sudoku4-masked --workdir=runs/sudoku4-masked

Hardware: 2 CPU cores. sudoku4-masked: 1,200 updates in 1.5 to 3 minutes, 99 to 100 % solved in 16 passes. More figures,
the date and what was not run: docs/planning.md.
"""

from configs.planning import cells
from diffusion_lm.config import Config
from diffusion_lm.models.transformer import Architecture


def get_config(cell: str = "sudoku4-masked") -> Config:
    """cell: TASK-KIND, of those in cells.py."""
    return cells.config(cell, Architecture(width=128, layers=4, heads=4), steps=1200, batch=32, lr=2e-3)
