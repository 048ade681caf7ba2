"""What the configs of configs/planning share: the tasks, the kinds of models, and one training setup for all kinds.

An experiment is named TASK-KIND. All kinds of a task train on the same examples in the same order, for the same number
of steps, in a network of the same size with the same optimizer.
"""

import math

from diffusion_lm.config import Config
from diffusion_lm.models.base import DenoiserSpec
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
    """The kinds of models of a task, each with its task and objective.

    ar       autoregressive
    masked   masked diffusion, trained on the ELBO
    mgdm     masked diffusion with token reweighting
    fixed    a bidirectional network with one masking rate: the control without diffusion
    block    block diffusion, two canvases an answer
    joint    block diffusion and autoregression in one network, one canvas an answer
    scratch  joint, with a scratchpad's canvas before the answer's, for tasks that have one
    """
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


def task_and_objective(experiment: str) -> tuple[Task, Objective]:
    """The task and objective of TASK-KIND. ValueError for an unknown one."""
    name, _, kind = experiment.partition("-")
    if name not in TASKS:
        raise ValueError(f"planning: the task {name!r} is none of {', '.join(TASKS)}")
    known = kinds(TASKS[name])
    if kind not in known:
        raise ValueError(
            f"planning: the kind {kind!r} is none of {', '.join(known)}: give TASK-KIND, as sudoku4-masked"
        )
    return known[kind]


def config(experiment: str, model: DenoiserSpec, *, steps: int, batch: int, lr: float) -> Config:
    """The config of TASK-KIND. ValueError for an unknown one."""
    task, objective = task_and_objective(experiment)
    return Config(
        data=Examples(task=task, seq_len=min_seq_len(task, objective.layout)),
        model=model,
        process=Absorbing(),
        objective=objective,
        optim=AdamW(lr=lr, schedule=WarmupCosine(warmup=min(200, steps // 10), final=0.01)),
        train=Train(steps=steps, batch_size=batch, log_every=20, eval_every=0, eval_batches=2),
        checkpoint=Checkpointing(save_every=steps),
    )
