"""Counts saved predictions again, from their file alone.

    python -m launch.planning.rescore --experiment=sudoku4-masked \
        --predictions=runs/board/sudoku4-masked-0/predictions.jsonl

The last line on standard output is a JSON object: by decoding and denoising steps, how many answers were exact and how
many correct, with 95 % intervals. With --by_difficulty the same for each difficulty, for example a sudoku's blanks.
"""

from configs.planning.experiments import task_and_objective
from diffusion_lm.planning.results import Prediction, by_difficulty, by_setting, read_predictions
from diffusion_lm.planning.tasks.base import Task
from launch import command
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
EXPERIMENT = FLAGS.string("experiment", None, "What the predictions are of, as TASK-KIND.", required=True)
PREDICTIONS = FLAGS.string("predictions", None, "A predictions file of launch.planning.scoreboard.", required=True)
BY_DIFFICULTY = FLAGS.bool("by_difficulty", False, "Counts tests of each difficulty separately.")


def main() -> dict:
    task, _ = task_and_objective(EXPERIMENT.value)
    predictions = read_predictions(PREDICTIONS.value)
    if not BY_DIFFICULTY.value:
        return counts(task, predictions)
    return {str(difficulty): counts(task, some) for difficulty, some in by_difficulty(task, predictions).items()}


def counts(task: Task, predictions: list[Prediction]) -> dict:
    """decoding -> denoising steps -> both proportions."""
    found = {}
    for (decoding, steps), accuracy in by_setting(task, predictions).items():
        proportions = {name: proportion._asdict() for name, proportion in accuracy._asdict().items()}
        found.setdefault(decoding, {})[str(steps)] = proportions
    return found


if __name__ == "__main__":
    command.run(main, FLAGS)
