"""How many of a task's prompts were answered rightly, and how sure that is."""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_lm.planning.tasks.base import Example, Task


class Share(NamedTuple):
    """count of total, and the ends of its 95 % interval."""

    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.total


class Accuracy(NamedTuple):
    """exact: the answer is the example's own. verified: it is a right one."""

    exact: Share
    verified: Share


class Way(NamedTuple):
    """How an answer was written: the decoding's name, and the denoising passes asked for, of all answers of which one
    was kept. 0 passes: token by token."""

    decoding: str
    passes: int


TOKENS = Way("tokens", 0)


class Prediction(NamedTuple):
    """An example and what a network wrote, with its `Way`. nfe: forward passes that its batch took in all, prompt,
    commits and scores included."""

    prompt: str
    answer: str
    prediction: str
    decoding: str
    passes: int
    nfe: int

    @property
    def way(self) -> Way:
        return Way(self.decoding, self.passes)


def wilson(count: int, total: int, z: float = 1.959964) -> Share:
    """Wilson's score interval for a share (JASA 22, 1927): sensible at 0 and at 1 too. ValueError if total is 0."""
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"{count} of {total} is no share: give 0 <= count <= total, and some to count")
    middle = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(count * (total - count) / total + z * z / 4)
    return Share(count, total, max(0.0, middle - half), min(1.0, middle + half))


def accuracy(task: Task, predictions: Sequence[Prediction]) -> Accuracy:
    """Both shares of the predictions. ValueError if there are none."""
    exact = sum(p.prediction == p.answer for p in predictions)
    verified = sum(task.verify(p.prompt, p.prediction) for p in predictions)
    return Accuracy(wilson(exact, len(predictions)), wilson(verified, len(predictions)))


def by_way(task: Task, predictions: Iterable[Prediction]) -> dict[Way, Accuracy]:
    """Accuracy of each way: decodings in the order of their first prediction, passes ascending."""
    groups, order = {}, {}
    for prediction in predictions:
        groups.setdefault(prediction.way, []).append(prediction)
        order.setdefault(prediction.decoding, len(order))
    return {way: accuracy(task, groups[way]) for way in sorted(groups, key=lambda way: (order[way[0]], way[1]))}


def by_difficulty(task: Task, predictions: Iterable[Prediction]) -> dict[int, list[Prediction]]:
    """The predictions apart by what the task measures of their examples, ascending."""
    measured, groups = functools.cache(task.difficulty), {}
    for one in predictions:
        groups.setdefault(measured(Example(one.prompt, one.answer)), []).append(one)
    return dict(sorted(groups.items()))


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """A file of JSON lines, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(p._asdict()) + "\n" for p in predictions), encoding="utf-8")
    partial.replace(path)


def read_predictions(path: str | Path) -> list[Prediction]:
    """The inverse of write_predictions; files from before there were several decodings have easiest first, or token by
    token. ValueError naming the line of what isn't a prediction."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            older = {"decoding": "confidence" if record.get("passes") else TOKENS.decoding}
            found.append(Prediction(**{**older, **record}))
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: no prediction ({error})") from None
    return found
