"""Trains a config, or resumes the run in its workdir.

    python -m launch.train --config=configs/tinyshakespeare.py --workdir=runs/shakespeare --set=data.path=input.txt

SIGTERM and ^C save a checkpoint and exit 0. The last line on standard output is a JSON object with the final metrics.
"""

import dataclasses

import jax

from diffusion_lm.build import build
from diffusion_lm.training import loop
from launch import command, profiler
from launch.flags import Flags

FLAGS = Flags(command.FLAGS, profiler.FLAGS)
CONFIG = FLAGS.config()
WORKDIR = FLAGS.workdir()


def main() -> dict:
    config = CONFIG()
    run = build(config, WORKDIR.value)
    with profiler.some_calls(run.job.step) as step:
        result = loop.run(dataclasses.replace(run.job, step=step), config.train, WORKDIR.value, run.checkpoints)
    return {
        "steps": result.steps,
        "interrupted": result.interrupted,
        **({} if result.best_step is None else {"best_step": result.best_step}),
        **{name: value for name, value in result.values.items() if name != "step"},
        "tokens_per_s": result.tokens_per_s,
        "chips": jax.device_count(),
        "seconds": result.seconds,
        "spent": result.spent,
        "goodput": result.goodput,
        "mfu": result.mfu,
        "checkpoint": str(result.checkpoint),
    }


if __name__ == "__main__":
    command.run(main, FLAGS)
