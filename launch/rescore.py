"""Counts saved predictions again, from the file alone.

    python -m launch.rescore --task=sudoku4 --predictions=runs/board/sudoku4-masked-0/predictions.jsonl

The last line on standard output is a JSON object: by decoding and passes, how many were exact and how many right.
--by=0 counts prompts apart that have a different number of zeros, which are a sudoku's blanks: that number, then the
same.
"""

from absl import flags

from configs.planning.cells import TASKS
from diffusion_lm.evaluation.accuracy import Prediction, by_way, read_predictions
from launch import flags as launch_flags

TASK = flags.DEFINE_enum("task", None, list(TASKS), "What was asked.", required=True)
PREDICTIONS = flags.DEFINE_string("predictions", None, "A file that launch.scoreboard wrote.", required=True)

BY = flags.DEFINE_string("by", None, "A character: prompts are counted apart by how often they have it.")


def main() -> dict:
    predictions = read_predictions(PREDICTIONS.value)
    if BY.value is None:
        return counted(predictions)
    if len(BY.value) != 1:
        raise ValueError(f"--by={BY.value}: give one character")
    groups = {}
    for prediction in predictions:
        groups.setdefault(prediction.prompt.count(BY.value), []).append(prediction)
    return {str(times): counted(groups[times]) for times in sorted(groups)}


def counted(predictions: list[Prediction]) -> dict:
    """Both shares, by decoding and passes."""
    found = {}
    for (decoding, passes), both in by_way(TASKS[TASK.value], predictions).items():
        shares = {name: share._asdict() for name, share in both._asdict().items()}
        found.setdefault(decoding, {})[str(passes)] = shares
    return found


if __name__ == "__main__":
    launch_flags.run(main)
