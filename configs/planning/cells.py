"""What the configs of configs/planning share: the tasks, the kinds of network, and one training setting for all kinds.

A cell is TASK-KIND. Every kind of a task sees the same examples in the same order, for as many steps, in a network of
one size, under one optimizer.
"""

import math

from diffusion_lm.config import Config
from diffusion_lm.models.transformer import Architecture
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.base import Objective
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.planning.data import Examples, min_seq_len
from diffusion_lm.planning.objectives import MGDM, FixedRate
from diffusion_lm.planning.tasks.base import Task
from diffusion_lm.planning.tasks.countdown import Countdown
from diffusion_lm.planning.tasks.path import PathPlanning
from diffusion_lm.planning.tasks.queens import Queens
from diffusion_lm.planning.tasks.satisfiability import Satisfiability
from diffusion_lm.planning.tasks.scratchpad import Scratchpad
from diffusion_lm.planning.tasks.sudoku import Sudoku
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupCosine

TASKS: dict[str, Task] = {
    "sudoku4": Sudoku(size=4, least=4, most=8),
    "sudoku6": Sudoku(size=6, least=12, most=18),
    "sudoku9": Sudoku(),
    "countdown3": Countdown(numbers=3),
    "countdown4": Countdown(numbers=4),
    "countdown5": Countdown(numbers=5),
    "sat5": Satisfiability(variables=5),
    "sat7": Satisfiability(variables=7),
    "sat9": Satisfiability(variables=9),
    "path4": PathPlanning(nodes=7, length=4),
    "path": PathPlanning(),
    "queens": Queens(),
}


def kinds(task: Task) -> dict[str, tuple[Task, Objective]]:
    """The kinds of network, each with what it writes: ar; masked (the bound) and mgdm (token reweighting); fixed, the
    control without diffusion; block and joint, whose canvases hold half an answer and a whole one; scratch, which is
    joint with a canvas of work before the answer's, of tasks that have any."""
    answer = task.max_lengths[1] + 1
    joint = Joint(block_size=answer)
    plain = {
        "ar": AutoregressiveLoss(),
        "masked": ELBO(),
        "mgdm": MGDM(),
        "fixed": FixedRate(),
        "block": BlockELBO(block_size=math.ceil(answer / 2)),
        "joint": joint,
    }
    scratch = {"scratch": (Scratchpad(task=task), joint)} if hasattr(task, "scratchpad") else {}
    return {**{kind: (task, objective) for kind, objective in plain.items()}, **scratch}


def kind_of(cell: str) -> tuple[Task, Objective]:
    """What a cell writes and learns by. ValueError for one that isn't there."""
    name, _, kind = cell.partition("-")
    if name not in TASKS:
        raise ValueError(f"planning: task {name!r} is none of {', '.join(TASKS)}")
    known = kinds(TASKS[name])
    if kind not in known:
        raise ValueError(f"planning: kind {kind!r} is none of {', '.join(known)}: name a cell as sudoku4-masked")
    return known[kind]


def config(cell: str, model: Architecture, *, steps: int, batch: int, lr: float) -> Config:
    """The experiment of a cell. ValueError for one that isn't there."""
    task, objective = kind_of(cell)
    return Config(
        data=Examples(task=task, seq_len=min_seq_len(task, objective.layout)),
        model=model,
        process=Absorbing(),
        objective=objective,
        optim=AdamW(lr=lr, schedule=WarmupCosine(warmup=min(200, steps // 10), final=0.01)),
        train=Train(steps=steps, batch_size=batch, log_every=20, eval_every=0, eval_batches=2),
        checkpoint=Checkpointing(save_every=steps),
    )
