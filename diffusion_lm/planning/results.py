"""Accuracy on a task's prompts with confidence intervals, and the predictions it is computed from."""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_lm import files
from diffusion_lm.planning.tasks.base import Example, Task


class Proportion(NamedTuple):
    """count of total, with the ends of its 95 % confidence interval."""

    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.total


class Accuracy(NamedTuple):
    """exact: the answer equals the example's own. verified: it is correct, be it the example's own or another."""

    exact: Proportion
    verified: Proportion


class Setting(NamedTuple):
    """How answers were generated: the decoding's name, and the denoising steps requested for an answer.

    Where the best of several answers is kept, the steps count all of them. 0 steps: autoregressive decoding.
    """

    decoding: str
    denoising_steps: int


AUTOREGRESSIVE = Setting("autoregressive", 0)


class Prediction(NamedTuple):
    """An example and a network's answer to it, with its `Setting`.

    nfe  forward passes that the answer's batch took, those for prompt, commits and scores included
    """

    prompt: str
    answer: str
    prediction: str
    decoding: str
    denoising_steps: int
    nfe: int

    @property
    def setting(self) -> Setting:
        return Setting(self.decoding, self.denoising_steps)


def wilson(count: int, total: int, z: float = 1.959964) -> Proportion:
    """Wilson's score interval of a proportion (JASA 22, 1927), which also holds at 0 and 1.

    Args:
      count: successes.
      total: trials, at least 1.
      z: the normal quantile; the default gives 95 %.

    Raises:
      ValueError: unless 0 <= count <= total and total >= 1.
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"{count} of {total} is no proportion: it takes 0 <= count <= total, and total >= 1")
    middle = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(count * (total - count) / total + z * z / 4)
    return Proportion(count, total, max(0.0, middle - half), min(1.0, middle + half))


def accuracy(task: Task, predictions: Sequence[Prediction]) -> Accuracy:
    """Both accuracies of predictions. ValueError if there are none."""
    exact = sum(p.prediction == p.answer for p in predictions)
    verified = sum(task.verify(p.prompt, p.prediction) for p in predictions)
    return Accuracy(wilson(exact, len(predictions)), wilson(verified, len(predictions)))


def by_setting(task: Task, predictions: Iterable[Prediction]) -> dict[Setting, Accuracy]:
    """Accuracy of each setting: decodings in the order of their first prediction, steps ascending."""
    groups, order = {}, {}
    for prediction in predictions:
        groups.setdefault(prediction.setting, []).append(prediction)
        order.setdefault(prediction.decoding, len(order))
    return {key: accuracy(task, groups[key]) for key in sorted(groups, key=lambda key: (order[key[0]], key[1]))}


def by_difficulty(task: Task, predictions: Iterable[Prediction]) -> dict[int, list[Prediction]]:
    """Predictions grouped by their example's difficulty, ascending."""
    difficulty, groups = functools.cache(task.difficulty), {}
    for one in predictions:
        groups.setdefault(difficulty(Example(one.prompt, one.answer)), []).append(one)
    return dict(sorted(groups.items()))


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Writes a JSON Lines file, all of it or nothing."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    with files.named(path):
        partial.write_text("".join(json.dumps(p._asdict()) + "\n" for p in predictions), encoding="utf-8")
        partial.replace(path)


def read_predictions(path: str | Path) -> list[Prediction]:
    """Reads what `write_predictions` wrote. ValueError naming the first line that isn't a prediction."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            one = Prediction(**json.loads(line))
            for name, kind in Prediction.__annotations__.items():
                if type(value := getattr(one, name)) is not kind:
                    raise TypeError(f"{name} is {value!r}")
            found.append(one)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a prediction ({error})") from None
    return found
