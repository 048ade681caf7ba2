"""Counts saved predictions again, from the file alone.

    python -m launch.planning.rescore --cell=sudoku4-masked --predictions=runs/board/sudoku4-masked-0/predictions.jsonl

The last line on standard output is a JSON object: by decoding and passes, how many were exact and how many right.
--by_difficulty counts prompts apart that are hard to a different degree, a sudoku's by its blanks for example (see the
tasks' `measure`): that number, then the same.
"""

from configs.planning.cells import kind_of
from diffusion_lm.planning.results import Prediction, by_difficulty, by_way, read_predictions
from diffusion_lm.planning.tasks.base import Task
from launch import command
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
CELL = FLAGS.string("cell", None, "What was asked, as TASK-KIND.", required=True)
PREDICTIONS = FLAGS.string("predictions", None, "A file that launch.planning.scoreboard wrote.", required=True)

BY_DIFFICULTY = FLAGS.bool("by_difficulty", False, "Prompts are counted apart by how hard they are.")


def main() -> dict:
    task, _ = kind_of(CELL.value)
    predictions = read_predictions(PREDICTIONS.value)
    if not BY_DIFFICULTY.value:
        return counted(task, predictions)
    return {str(hard): counted(task, some) for hard, some in by_difficulty(task, predictions).items()}


def counted(task: Task, predictions: list[Prediction]) -> dict:
    """Both shares, by decoding and passes."""
    found = {}
    for (decoding, passes), both in by_way(task, predictions).items():
        shares = {name: share._asdict() for name, share in both._asdict().items()}
        found.setdefault(decoding, {})[str(passes)] = shares
    return found


if __name__ == "__main__":
    command.run(main, FLAGS)
