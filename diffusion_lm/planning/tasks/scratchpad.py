"""Thinking before answering: a canvas of work, and then the answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diffusion_lm.planning.tasks.base import Example, Task

REST = "."  # what is left of the canvas


class HasScratchpad(Task, Protocol):
    """A task that can say what comes before an answer."""

    def scratchpad(self, example: Example) -> str:
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
        return self.task.max_lengths[1] + 1

    @property
    def max_lengths(self) -> tuple[int, int]:
        prompt, answer = self.task.max_lengths
        return prompt, self.canvas + answer

    @property
    def difficulty_unit(self) -> str:
        return self.task.difficulty_unit

    def draw(self, rng) -> Example:
        return self._worked(self.task.draw(rng))

    def verify(self, prompt: str, answer: str) -> bool:
        return self.task.verify(prompt, answer[self.canvas :])

    def difficulty(self, example: Example) -> int:
        return self.task.difficulty(self._plain(example))

    def split_key(self, example: Example) -> str:
        return self.task.split_key(self._plain(example))

    def read(self, path: str | Path) -> list[Example]:
        return [self._worked(example) for example in self.task.read(path)]

    def _worked(self, example: Example) -> Example:
        return Example(example.prompt, self.task.scratchpad(example).ljust(self.canvas, REST) + example.answer)

    def _plain(self, example: Example) -> Example:
        return Example(example.prompt, example.answer[self.canvas :])
