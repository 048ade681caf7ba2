"""Counts saved predictions again, from the file alone.

    python -m launch.rescore --task=sudoku4 --predictions=runs/board/sudoku4-masked/predictions.jsonl

The last line on standard output is a JSON object: by passes, how many were exact and how many right.
"""

from absl import flags

from configs.planning.cells import TASKS
from diffusion_lm.evaluation.accuracy import by_passes, read_predictions
from launch import flags as launch_flags

TASK = flags.DEFINE_enum("task", None, list(TASKS), "What was asked.", required=True)
PREDICTIONS = flags.DEFINE_string("predictions", None, "A file that launch.scoreboard wrote.", required=True)


def main() -> dict:
    found = by_passes(TASKS[TASK.value], read_predictions(PREDICTIONS.value))
    return {
        str(passes): {name: share._asdict() for name, share in counted._asdict().items()}
        for passes, counted in found.items()
    }


if __name__ == "__main__":
    launch_flags.run(main)
