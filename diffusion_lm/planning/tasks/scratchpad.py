"""Thinking before answering: a canvas of work, and then the answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diffusion_lm.planning.tasks.base import Example, Task

REST = "."  # what is left of the canvas


class HasScratchpad(Task, Protocol):
    """A task that can say what comes before an answer."""

    def work(self, example: Example) -> str:
        """What helps to write the answer, in the task's alphabet; at most `longest[1]` characters."""


@dataclass(frozen=True, kw_only=True)
class Scratchpad:
    """The task's prompts -> its work, dots up to the canvas's end, and the answer: `1000...` -> `1230....1234`.

    Canvases of `canvas` positions begin with the work, and then with the answer. Only the answer is verified.
    """

    task: HasScratchpad

    @property
    def alphabet(self) -> str:
        return self.task.alphabet + REST

    @property
    def canvas(self) -> int:
        """An answer's positions, end of text included."""
        return self.task.longest[1] + 1

    @property
    def longest(self) -> tuple[int, int]:
        prompt, answer = self.task.longest
        return prompt, self.canvas + answer

    @property
    def measured(self) -> str:
        return self.task.measured

    def draw(self, rng) -> Example:
        return self._worked(self.task.draw(rng))

    def verify(self, prompt: str, answer: str) -> bool:
        return self.task.verify(prompt, answer[self.canvas :])

    def measure(self, example: Example) -> int:
        return self.task.measure(self._plain(example))

    def unseen(self, example: Example) -> str:
        return self.task.unseen(self._plain(example))

    def read(self, path: str | Path) -> list[Example]:
        return [self._worked(example) for example in self.task.read(path)]

    def _worked(self, example: Example) -> Example:
        return Example(example.prompt, self.task.work(example).ljust(self.canvas, REST) + example.answer)

    def _plain(self, example: Example) -> Example:
        return Example(example.prompt, example.answer[self.canvas :])
